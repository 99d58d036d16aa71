"""Whether a killed run loses or leaves anything: runs of ``lowbit quantize``, killed at random and repeated until they end.

    python tests/kills.py --count 100 --seed 0

Each run is killed once to three times: by SIGKILL, or now and then by SIGTERM or SIGINT, at a random moment of its life, or
just before a random one of the things it does to files, which the last renames fill though they take no time. Then it is
repeated until it ends, or is told that the target is there already. The target has the bytes of an undisturbed run's, file
for file, and nothing lies beside it or among temporary files. A signal ends a run as it should: no
traceback, nothing that hangs. Runs are forks of one process that has imported everything. What is done to a run follows
from its number, but for the moments, which the machine's speed shifts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz import QUIET, SIZES

SECONDS = 60
"""Of a run that hangs."""
SHARD = 60_000
"""Bytes of a shard at most, so that tiny checkpoints have several."""
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130}}
"""What a run's process ends with after a signal. SIGTERM is the system's before a command has begun and when it is done."""
FILE_ACTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.listdir"}
WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps in the sun while cats watch from a wall".split()


# What is run


@dataclass(frozen=True)
class Command:
    """A command line without its target, and what an undisturbed run of it does.

    Attributes:
        seconds: its length.
        acts: how often it touches files of the target.
        files: the checkpoint's files and their hashes.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float = 0.0
    acts: int = 0
    files: tuple[tuple[str, str], ...] = ()


def make_commands(place: Path, count: int) -> list[Command]:
    """A tiny model with a tokenizer and a text in ``place``, and ``count`` commands that quantize it."""
    import yaml
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import lowbit
    from lowbit.numerics import to_dict
    from lowbit.recipes import Train
    from lowbit.training import OriginalKL, StoredFloats

    from helpers import tiny_llama

    source, text, tuned = tiny_llama(place / "source", **SIZES), place / "text.txt", place / "tuned.yaml"
    letters = {letter: i for i, letter in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(source)
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=400)))
    recipe = lowbit.recipe("gptq", bits=4, group_size=64)
    trained = replace(recipe, stages=(*recipe.stages, Train(StoredFloats(), OriginalKL(), epochs=2)))
    tuned.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(trained)))))
    read, none = str(text), "none"
    ways: dict[str, tuple[str, ...]] = {
        "gptq, trained": (read, "--recipe", str(tuned)),
        "rtn without text": (none, "--method", "rtn", "--bits", "4"),
        "gptq, packed embedding": (
            read,
            "--method",
            "gptq",
            "--bits",
            "4",
            "--group-size",
            "64",
            "--embedding-bits",
            "8",
        ),
        "awq, activations in files": (read, "--method", "awq", "--bits", "4", "--group-size", "64", "--ram-limit", "0"),
        "squeezellm": (read, "--method", "squeezellm", "--bits", "3"),
    }
    common = ("quantize", str(source), "--samples", "4", "--seq-len", "32", "--allow-broken", "--calibration")
    commands = [Command(name, (*common, *words)) for name, words in list(ways.items())[:count]]
    return [_undisturbed(command, place / f"whole-{number}") for number, command in enumerate(commands)]


def _undisturbed(command: Command, place: Path) -> Command:
    start = time.monotonic()
    run = Run(command, place)
    code = run.wait()
    assert code == 0, f"{command.name} ended with {code}:\n{run.said()}"
    seconds, acts = time.monotonic() - start, int((place / "acts").read_text())
    return replace(command, seconds=seconds, acts=acts, files=tuple(files_of(place / "here" / "q").items()))


def files_of(directory: Path) -> dict[str, str]:
    """Every file below ``directory`` with its hash, but those that say when a training did what."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and "training-" not in str(path))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# One run, and what is done to it


class Run:
    """A process that runs ``command`` into ``place / "here" / "q"``.

    Args:
        place: has the target's directory, one for temporary files, and what the run says.
        kill: a signal and the number of the act on files before which the process sends it to itself.
    """

    def __init__(self, command: Command, place: Path, kill: tuple[int, int] | None = None):
        self._place, self._start = place, time.monotonic()
        for name in ("here", "temporary"):
            (place / name).mkdir(parents=True, exist_ok=True)
        sys.stdout.flush(), sys.stderr.flush()
        self._process = os.fork()
        if self._process == 0:
            _child(command, place, kill)

    def kill_after(self, seconds: float, number: int) -> None:
        """Sends signal ``number`` at a moment of the run's life, unless it has ended."""
        ended = self._wait_until(self._start + seconds)
        if not ended:
            os.kill(self._process, number)

    def wait(self) -> int | None:
        """The exit code, minus the signal that ended the process, or None: it hung."""
        if self._wait_until(time.monotonic() + SECONDS):
            return self._code
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        return None

    def said(self) -> str:
        return (self._place / "said").read_text(errors="replace")

    _code: int | None = None

    def _wait_until(self, moment: float) -> bool:
        while self._code is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self._code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() >= moment:
                return False
            time.sleep(0.0005)
        return True


def _child(command: Command, place: Path, kill: tuple[int, int] | None) -> None:
    """The life of a run's process."""
    code = 99
    try:
        said = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
        tempfile.tempdir = str(place / "temporary")
        target, acts = str(place / "here" / "q"), 0

        def act(event: str, arguments: Any) -> None:
            nonlocal acts
            if event in FILE_ACTS and str(arguments[0]).startswith(target):
                acts += 1
                if kill is not None and acts == kill[1]:
                    os.kill(os.getpid(), kill[0])

        sys.addaudithook(act)
        from lowbit.__main__ import main

        sys.argv = ["lowbit", *command.arguments, "-o", target]
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        (place / "acts").write_text(str(acts))
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def disturbed(commands: list[Command], place: Path, number: int, counts: Counter[str]) -> str | None:
    """Kills and repeats run ``number``; what is wrong, if anything."""
    rng = random.Random(f"kills {number}")
    command = commands[number % len(commands)]
    for time_left in reversed(range(rng.choice([1, 1, 2, 3]) + 1)):
        number = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
        at_act, share = rng.random() < 0.5, rng.random()
        if not time_left:
            what, run = "undisturbed", Run(command, place)
        elif at_act:
            act = 1 + int(share * command.acts)
            what, run = f"{number.name} before act {act}", Run(command, place, (number, act))
        else:
            what, run = f"{number.name} after {share:.2f} of its time", Run(command, place)
            run.kill_after(share * command.seconds, number)
        code = run.wait()
        what = f"{command.name}: {what}"
        if code is None:
            return f"{what}: HUNG: over {SECONDS} s"
        finished = code == 0
        if not finished and (not time_left or code not in ENDS[number]):
            return f"{what}: ended with {code}: {run.said()[-2000:]}"
        if code not in (0, -9, -15) and "Traceback" in run.said():
            return f"{what}: TRACEBACK: {run.said()[-2000:]}"
        counts["ended first" if finished else number.name] += 1
        if not finished and (place / "here" / "q").exists():  # killed after its last rename
            run, finished = Run(command, place), True
            if run.wait() != 1 or "exists and is not empty" not in run.said():
                return f"{what}: the repetition of a finished run ended with {run.wait()}: {run.said()[-2000:]}"
            counts["of them after the last rename"] += 1
        if finished:
            wrong = _wrong(command, place)
            return wrong and f"{what}: {wrong}"
        counts["of them with finished blocks"] += _blocks(place) > 0
    raise AssertionError("the last repetition is undisturbed")


def _blocks(place: Path) -> int:
    journal = place / "here" / "q.partial" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def _wrong(command: Command, place: Path) -> str | None:
    """How what ``place`` holds differs from one finished checkpoint."""
    beside = [path.name for path in (place / "here").iterdir() if path.name != "q"]
    if beside or any((place / "temporary").iterdir()):
        return f"LEFT: {beside}, {[path.name for path in (place / 'temporary').iterdir()]}"
    found, wanted = files_of(place / "here" / "q"), dict(command.files)
    differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return f"OTHER BYTES: {differ}" if differ else None


def failures(count: int, seed: int, commands: int, report: Callable[[str], None] = print) -> list[str]:
    """Runs that did not end as they should, a line each.

    Args:
        count: of runs.
        seed: of the first one; runs are numbered from ``1000 * seed``.
        commands: how many command lines the runs take turns with.
        report: is called with a line for each failure, and with the counts at the end.
    """
    import rich.progress  # noqa: F401  # before the forks, for all of them
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lowbit.cli
    import lowbit.pipeline  # noqa: F401
    from lowbit.kernels.instructions import speedup
    from lowbit.stages import merge

    torch.set_num_threads(1)
    merge.SHARD_BYTES = SHARD
    for dtype in (torch.bfloat16, torch.int8):  # measured once for all runs: what is written depends on it
        speedup(dtype)
    lines, counts = [], Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        made = make_commands(Path(scratch), commands)
        for number in range(1000 * seed, 1000 * seed + count):
            place = Path(scratch) / f"run-{number}"
            wrong = disturbed(made, place, number, counts)
            if wrong is not None:
                lines.append(f"run {number}: {wrong}")
                report(lines[-1])
            shutil.rmtree(place)
    kills = ", ".join(f"{name}: {total}" for name, total in sorted(counts.items()))
    report(f"{count} runs, {len(lines)} failures; {kills}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--commands", type=int, default=5, choices=range(1, 6), help="how many command lines take turns"
    )
    options = parser.parse_args()
    # One thread: a fork has none of its parent's.
    os.environ |= {**QUIET, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return 1 if failures(options.count, options.seed, options.commands) else 0


if __name__ == "__main__":
    sys.exit(main())
