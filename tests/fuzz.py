"""Whether anything that is read can hurt: mutated checkpoints, recipe files and command lines.

    python tests/fuzz.py --count 300 --seed 0 --kind all

Every case ends in one line that says what is wrong, or in a model whose logits are finite. A traceback of another kind, a
crash, a case of over 20 seconds or of over 4 GB is a failure. Cases run in worker processes, many in each, so that a crash
or a hang is seen and belongs to its case. A case is its kind and its number: the same two make the same mutation.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES, ADDRESSES = 20, 4 * 2**30, 8 * 2**30
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
START_SECONDS = 120
"""For the first case of a worker, which imports torch."""

# Methods, their options, and whether they need calibration. Between them: every kind of tensor and every place of a part.
BASES: dict[str, tuple[dict[str, Any], bool]] = {
    "rtn": ({"bits": 4, "group_size": 16}, False),
    "gptq": ({"bits": 4, "group_size": 16, "act_order": True}, True),
    "spqr": ({"bits": 3}, True),
    "nf4": ({}, False),
    "quip": ({"bits": 2}, True),
    "squeezellm": ({"bits": 3, "sparsity": 0.02}, True),
    "owq": ({"bits": 3}, True),
    "olive": ({}, True),
    "smoothquant": ({}, True),
    "quarot": ({"bits": 4}, True),
    "qllm": ({}, True),
    "rptq": ({}, True),
    "lut-gemm": ({"bits": 3}, False),
    "mxfp4": ({}, False),
    "llm-int8": ({}, False),
    "outlier-suppression-plus": ({}, True),
}
SIZES = {"vocab_size": 300, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1}
"""Of the tiny model, where they are not those of tests/helpers.py."""

Case = tuple[str, int]


# What is mutated


def make_bases(place: Path, count: int) -> None:
    """A tiny model in ``place / "source"``, and checkpoints of it by ``count`` methods."""
    import torch

    import lowbit

    from helpers import tiny_llama

    tiny_llama(place / "source", **SIZES)
    ids = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    for name, (options, calibrated) in list(BASES.items())[:count]:
        recipe = lowbit.recipe(name, **options)
        text = ids if calibrated else None
        lowbit.quantize(place / "source", recipe, text, out=place / name, allow_broken=True)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 10**12, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "int", "Int", "float32", "model.norm", "x" * 3000, [], {}, [[]], [None], {"type": "Int"}, {"type": []}, {"a": 1},
    [64, 64], [1, 64], {"shape": [64], "dtype": "int32"}, {"type": "Spec", "grid": 1},
)  # fmt: skip


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in ``tree`` with every key or index in it."""
    found = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += [(tree, key), *places_in(value)]
    return found


def mutate_tree(tree: Any, rng: random.Random) -> None:
    """Changes plain data in one place."""
    places = places_in(tree)
    if not places:
        return
    inside, key = rng.choice(places)
    value = inside[key]
    match rng.randrange(8):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[rng.choice(["x", "type", "size", "bits", "1"])] = rng.choice(VALUES)
        case 1:
            inside.insert(key, copy.deepcopy(value))
        case 2 | 3 if type(value) in (int, float):
            inside[key] = rng.choice([value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value)])
        case 4:
            other, place = rng.choice(places)
            inside[key] = copy.deepcopy(other[place])
        case 5:
            deep: Any = copy.deepcopy(value)
            for _ in range(rng.choice([1, 2, 200])):
                deep = [deep]
            inside[key] = deep
        case _:
            inside[key] = copy.deepcopy(rng.choice(VALUES))


def mutate_tensor(tensor: Any, rng: random.Random) -> Any:
    """A tensor of other numbers, of another shape or of another dtype."""
    import torch

    flat = tensor.contiguous().view(-1).clone()
    at = rng.randrange(max(1, flat.numel()))
    some = slice(at, at + 1) if rng.random() < 0.5 else slice(None)
    kind = rng.randrange(4)
    if kind == 0:  # shape
        shapes = (
            flat, flat[None], tensor[None], tensor[..., None], tensor.T if tensor.dim() == 2 else flat[::2],
            flat[: max(1, len(flat) // 2)], flat[:0], torch.cat([flat, flat]), flat[:1], tensor[:-1] if tensor.dim() else flat,
        )  # fmt: skip
        return rng.choice(shapes).contiguous()
    if kind == 1:  # dtype
        dtypes = (
            torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool,
        )  # fmt: skip
        return tensor.float().to(rng.choice(dtypes))
    if flat.dtype.is_floating_point:
        wide = flat.float()
        choices = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0)
        wide[some] = rng.choice(choices) if rng.random() < 0.8 else -wide[some]
        return wide.to(flat.dtype).view(tensor.shape)
    if flat.dtype == torch.bool or not flat.numel():
        return tensor
    info = torch.iinfo(flat.dtype)
    match rng.randrange(4):
        case 0:
            flat[some] = rng.choice([info.max, info.min, 0, min(info.max, 64), min(info.max, 128)])
        case 1:
            flat[some] = flat[0].clone()
        case 2:
            flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(rng.randrange(2**31)))]
        case _:
            flat = torch.randint(max(info.min, -(2**31)), min(info.max, 2**31 - 1), flat.shape, dtype=flat.dtype)
    return flat.view(tensor.shape)


def new_part(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A transform or side term of more or less fitting tensors: its place, its description, its tensors."""
    import torch

    def size() -> int:
        return rng.choice([64, 64, 64, 128, 32, 8, 1, 0, 63])

    def indices() -> Any:
        n = size()
        return rng.choice([torch.randperm(n), torch.arange(n), torch.randint(-1, 200, (n,)), torch.zeros(n)]).int()

    def seeded(kind: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        plain = {
            "size": rng.choice([64, 8, 128, 0, -1, 10**12, 2**31, True, "64"]),
            "inverted": rng.choice([False, True, 1]),
        }
        return kind, plain, {"seed": torch.tensor([rng.choice([5, -5])])}

    n, k, place = size(), size(), rng.choice(["pre", "pre", "post", "side"])
    if place == "side":
        name, plain, tensors = rng.choice(
            [
                ("KeptColumns", {}, {"index": indices(), "value": torch.ones(n, k).half()}),
                ("LowRank", {}, {"a": torch.ones(4, n).half(), "b": torch.ones(k, 4).half()}),
                ("Sparse", {}, {"row_start": indices(), "column": indices().short(), "value": torch.ones(n).half()}),
            ]
        )
    else:
        name, plain, tensors = rng.choice(
            [
                ("Permute", {}, {"index": indices()}),
                ("Scale", {}, {"s": torch.full((n,), rng.choice([1.0, 0.0, float("nan")]))}),
                ("Shift", {}, {"d": torch.ones(n)}),
                ("Rotate", {}, {"q": torch.eye(n)[:, :k].contiguous()}),
                ("Split", {}, {"counts": indices()}),
                ("Reassembly", {"size": rng.choice([64, 10**9])}, {f: indices() for f in ("slot", "into", "copied")}),
                seeded("Kronecker"),
                seeded("RandomHadamard"),
            ]
        )
    return place, {"type": name, **plain}, tensors


def mutated_checkpoint(bases: Path, place: Path, number: int) -> str:
    """Checkpoint ``number`` in ``place``; what was done to it."""
    from safetensors.torch import load_file, save_file

    rng = random.Random(f"checkpoint {number}")
    base = rng.choice(sorted(path.name for path in bases.iterdir() if path.name in BASES))
    shutil.copytree(bases / base, place)
    config = json.loads((place / "config.json").read_text())
    said = config["quantization_config"]
    shards = {file: load_file(file) for file in sorted(place.glob("*.safetensors"))}
    done = [base]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        file = rng.choice([file for file, tensors in shards.items() if tensors])
        tensors = shards[file]
        name = rng.choice(sorted(tensors))
        kind = rng.choice(
            ["config", "config", "config", "tensor", "tensor", "tensor", "together", "part", "lost", "model", "bytes"]
        )
        done.append(f"{kind} {name}")
        if kind == "config":
            mutate_tree(said, rng)
        elif kind == "model":
            config[rng.choice(sorted(config))] = rng.choice(VALUES)
        elif kind == "tensor":
            tensors[name] = mutate_tensor(tensors[name], rng)
        elif kind == "lost":
            moved = tensors.pop(name)
            if rng.random() < 0.3:
                tensors[name + "x"] = moved
        elif kind in ("together", "part"):
            layer, _, buffer = name.rpartition(".")
            if not isinstance(said.get("layers"), dict) or type(number_of := said["layers"].get(layer)) is not int:
                continue
            if not isinstance(schemes := said.get("schemes"), list) or not isinstance(schemes[number_of], dict):
                continue
            scheme = copy.deepcopy(schemes[number_of])
            schemes.append(scheme)
            said["layers"][layer], said["version"] = len(schemes) - 1, 3
            if kind == "part":
                where, part, new = new_part(rng)
                at = len(scheme.setdefault(where, []))
                scheme[where].append(part)
                for field, tensor in new.items():
                    tensors[f"{layer}.{where}{at}_{field}"] = tensor
                    part[field] = described(tensor)
                continue
            tensors[name] = mutate_tensor(tensors[name], rng)
            where, _, field = buffer.partition("_")
            if field and where[:-1] in ("pre", "post", "side"):
                scheme[where[:-1]][int(where[-1])][field] = described(tensors[name])
    index = place / "model.safetensors.index.json"
    if index.exists():
        names = {name: file.name for file, tensors in shards.items() for name in tensors}
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": names}))
    for file, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    if any(each.startswith("bytes") for each in done):
        damage(rng.choice(sorted(path for path in place.iterdir() if path.suffix in (".json", ".safetensors"))), rng)
    return ", ".join(done)


def described(tensor: Any) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def damage(file: Path, rng: random.Random) -> None:
    """Cuts a file, changes some of its first bytes, or removes it."""
    content = bytearray(file.read_bytes())
    match rng.randrange(4):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(content[: rng.randrange(len(content))])
        case 2:
            file.write_bytes(b"[" * 100_000)
        case _:
            header = (
                min(len(content), 8 + int.from_bytes(content[:8], "little"))
                if file.suffix == ".safetensors"
                else len(content)
            )
            for _ in range(rng.choice([1, 3])):
                content[rng.randrange(header)] = rng.randrange(256)
            file.write_bytes(content)


RECIPES = (
    "method: rtn\noptions: {bits: 4, group_size: 16}\n",
    "method: gptq\noptions: {bits: 3}\noverrides:\n  - {match: 're:layers\\.0\\.', bits: 8}\n  - {match: down, skip: true}\n",
    "method: smoothquant+rtn\nseed: 3\nfeed: fp\n",
    "method: awq\noptions: {bits: 4}\noverrides: [{match: 'model.layers.1.*', group_size: channel}]\n",
)
TEXTS = (
    "a: &a [*a]\n", "x: &x {y: 1}\n<<: *x\n", "\t\n", "!!timestamp x", "!!python/object/apply:os.system [x]", "? {a: 1}\n: 2\n",
    "1: 2\n", "'re:(a+)+$'", "'re:" + "a?" * 60 + "'", "[" * 2000, "method: rtn\n", "{", "2020-99-99", "!!bool x", "1e999",
    "10000000000000000000000000", ".nan", "-1", "'" + "x" * 4000 + "'", "&b [x, x]", "\x00", "'*' ", "~",
)  # fmt: skip


def mutated_recipe(place: Path, number: int) -> str:
    """Recipe file ``number`` in ``place``; its text."""
    import yaml

    import lowbit
    from lowbit.numerics import to_dict

    rng = random.Random(f"recipe {number}")
    text = rng.choice(RECIPES)
    if rng.random() < 0.6:
        if rng.random() < 0.6:
            name = rng.choice(sorted(BASES))
            data = to_dict(lowbit.recipe(name, **BASES[name][0]))
        else:
            data = yaml.safe_load(text)
        data = json.loads(json.dumps(data))
        for _ in range(rng.choice([1, 1, 2])):
            mutate_tree(data, rng)
        try:
            text = yaml.safe_dump(data)
        except RecursionError:
            text = json.dumps(data)
    if rng.random() < 0.5:
        at = rng.randrange(len(text))
        text = rng.choice(
            [
                text[:at] + rng.choice(TEXTS) + text[at:],
                text[:at] + text[at + rng.randrange(8) :],
                text + text[at:],
                text.replace(rng.choice(["4", "rtn", "down", "Int", "true"]), rng.choice(TEXTS)),
                "b0: &b0 [x, x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40)) + text,
            ]
        )
    place.write_text(text, encoding="utf-8")
    return text


def command_line(model: Path, recipe: Path, number: int) -> list[str]:
    """A command that reads ``recipe``, or one of mutated options."""
    rng = random.Random(f"command {number}")
    if rng.random() < 0.6:
        return ["plan", str(model), "--recipe", str(recipe)]
    words = [
        "--method", "rtn", "gptq", "awq+gptq", "rtn+rtn", "+", "--bits", "4", "0", "-1", "99999999999999", "nan", "--group-size",
        "channel", "16", "--set", "bits=4", "x=1", "=", "bits=[[", "seed=1e400", "--override", "down:bits=3", "re:(a+)+:bits=3",
        "re:(:skip", "*:skip", "--samples", "--seq-len", "--json", "--ram-limit", "1G", "-1G", "xG", "--activation-bits", "8",
        "--recipe", str(recipe), "w4-rtn", "", "\x7f", "é", "--help",
    ]  # fmt: skip
    if rng.random() < 0.5:
        options = {
            "--method": ["rtn", "gptq", "awq+gptq", "rtn+rtn", "+", ""],
            "--bits": ["4", "0", "-1", "99999999999999", "nan"],
            "--group-size": ["channel", "16", "0", "-3", "1000000000000"],
            "--set": ["bits=4", "x=1", "=", "bits=[[", "seed=1e400", "damp=nan", "symmetric=maybe"],
            "--override": ["down:bits=3", "re:(a+)+:bits=3", "re:(:skip", "*:skip", ":", "down:bits=99", "down"],
            "--activation-bits": ["8", "0", "-1"],
            "--ram-limit": ["1G", "-1G", "xG", "1e400"],
            "--samples": ["0", "4", "-1", "1000000000000"],
            "--seq-len": ["16", "0", "-5", "1000000000000"],
        }
        chosen = rng.sample(sorted(options), k=rng.randrange(1, 5))
        return ["plan", str(model), *(word for name in chosen for word in (name, rng.choice(options[name])))]
    command = rng.choice(["plan", "explain", "methods", "recipes", "nothing", "inspect"])
    return [command, *([str(model)] if rng.random() < 0.9 else []), *rng.choices(words, k=rng.randrange(6))]


# One case, in a worker


def run_checkpoint(bases: Path, number: int) -> tuple[str, str]:
    """How the case ended (``refused``, ``ran``, or what is a failure), and what was done and said."""
    import torch
    from transformers import AutoModelForCausalLM

    import lowbit

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "q"
        done = mutated_checkpoint(bases, place, number)
        try:
            model = lowbit.load(place)
        except (ValueError, OSError) as error:
            outcome = "refused" if "\n" not in str(error) and str(place) in str(error) else "NO LINE"
            if number % 4 == 0 and outcome == "refused":
                try:
                    model = AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
                except Exception:  # in transformers' own words, or in ours
                    return outcome, f"{done}: {error}"
                return finite(model), f"{done}: transformers reads it, though {error}"
            return outcome, f"{done}: {type(error).__name__}: {error}"
        except Exception as error:
            return "TRACEBACK", f"{done}: {type(error).__name__}: {error}"
        try:
            with torch.no_grad():
                return finite(model), done
        except Exception as error:
            return "FIRST TOKEN", f"{done}: {type(error).__name__}: {error}"


def finite(model: Any) -> str:
    """``ran`` if logits of a prompt and of the tokens after it are finite."""
    import torch

    tokens = torch.arange(2, 10)[None]
    with torch.no_grad():
        out = model(tokens, use_cache=True)
        logits = [out.logits]
        for token in (5, 6):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
            logits.append(out.logits)
    return "ran" if all(bool(torch.isfinite(each).all()) for each in logits) else "NOT FINITE"


def run_recipe(bases: Path, number: int) -> tuple[str, str]:
    """Likewise of a recipe file and a command line."""
    from typer.testing import CliRunner

    import lowbit
    from lowbit.cli import app

    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "r.yaml"
        text = mutated_recipe(recipe, number)
        arguments = command_line(bases / "source", recipe, number)
        result = CliRunner().invoke(app, arguments)
        said = (result.stderr.strip().splitlines() or [""])[-1]
        what = f"{' '.join(arguments)[-200:]!r}, {text[:300]!r}: exit {result.exit_code} {said[:300]}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return "TRACEBACK", f"{what}: {type(result.exception).__name__}: {result.exception}"
        if result.exit_code == 1 and not said.startswith("error: "):
            return "NO LINE", what
        if result.exit_code not in (0, 1, 2):
            return "EXIT CODE", what
        if result.exit_code or number % 4 or "--recipe" not in arguments:
            return ("ran" if result.exit_code == 0 else "refused"), what
        try:
            import torch

            ids = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
            lowbit.quantize(bases / "source", recipe, ids, out=Path(scratch) / "q", allow_broken=True)
            return finite(lowbit.load(Path(scratch) / "q")), what
        except (ValueError, OSError) as error:
            return "refused", f"{what}: {error}"
        except Exception as error:
            return "TRACEBACK", f"{what}: {type(error).__name__}: {error}"


RUN: dict[str, Callable[[Path, int], tuple[str, str]]] = {"checkpoint": run_checkpoint, "recipe": run_recipe}


def work(bases: Path) -> None:
    """Reads cases from stdin, one a line, and writes how each ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    import warnings

    warnings.simplefilter("ignore")
    for line in sys.stdin:
        kind, number = line.split()
        try:
            outcome, what = RUN[kind](bases, int(number))
        except MemoryError as error:
            outcome, what = "MEMORY", str(error)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > BYTES:
            outcome = "MEMORY"
        print(json.dumps([outcome, what]), file=answers, flush=True)


# All cases


class Worker:
    """A process that runs cases, started anew after one that it does not survive."""

    def __init__(self, bases: Path):
        self._bases = bases
        self._process: subprocess.Popen[str] | None = None

    def run(self, case: Case) -> tuple[str, str]:
        """How ``case`` ended."""
        seconds = SECONDS
        if self._process is None:
            seconds += START_SECONDS
            command = [sys.executable, __file__, "--worker", str(self._bases)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            print(*case, file=process.stdin, flush=True)
        except BrokenPipeError:
            return self._lost()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                return "HUNG", f"over {SECONDS} s"
        line = process.stdout.readline()
        return tuple(json.loads(line)) if line else self._lost()

    def _lost(self) -> tuple[str, str]:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        return "CRASHED", f"exit code {code}"

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # waits, and closes the pipes
            self._process = None


def outcomes(bases: Path, cases: list[Case]) -> Iterator[tuple[Case, str, str]]:
    """How each case ended."""
    worker = Worker(bases)
    try:
        for case in cases:
            yield case, *worker.run(case)
    finally:
        worker.close()


def failures(
    count: int, seed: int, kind: str, methods: int = len(BASES), report: Callable[[str], None] = print
) -> list[str]:
    """The cases that did not end as they should, a line each.

    Args:
        count: checkpoints; of recipe files and command lines half as many, or ``count`` where there is nothing else.
        seed: of the first case; cases are numbered from ``1000 * seed``.
        kind: ``checkpoint``, ``recipe`` or ``all``.
        methods: how many methods make the checkpoints.
        report: is called with a line for each failure, and with the counts at the end.
    """
    cases = [("checkpoint", 1000 * seed + i) for i in range(count) if kind != "recipe"]
    cases += [
        ("recipe", 1000 * seed + i) for i in range(count if kind == "recipe" else count // 2) if kind != "checkpoint"
    ]
    lines, counts = [], Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        make_bases(Path(scratch), methods)
        for case, outcome, what in outcomes(Path(scratch), cases):
            counts[f"{case[0]} {outcome}"] += 1
            if outcome not in ("ran", "refused"):
                lines.append(f"{' '.join(map(str, case))}: {outcome}: {what}")
                report(lines[-1])
    report(", ".join(f"{name}: {number}" for name, number in sorted(counts.items())))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=300, help="mutated checkpoints; half as many recipes and command lines"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=["checkpoint", "recipe", "all"], default="all")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= QUIET
    if options.worker is not None:
        work(options.worker)
        return 0
    return 1 if failures(options.count, options.seed, options.kind) else 0


if __name__ == "__main__":
    sys.exit(main())
