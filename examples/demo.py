"""All of lowbit on a real model in minutes: quantize, save packed, reload packed, measure, write a sentence.

SmolLM2-135M-Instruct, every linear of its blocks to 4 bits in groups of 64 by GPTQ. Calibration and evaluation texts are
disjoint: WikiText-2 where a hub answers, else two parts of Python's own documentation; the output says which.

    python examples/demo.py [-o DIR]

An interrupted demo continues where it stopped when it is run again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

import lowbit
from lowbit.checkpoints.gguf_reader import cache_directory
from lowbit.checkpoints.locate import locate
from lowbit.checkpoints.native import bits_report
from lowbit.cli import common
from lowbit.evaluation import (
    Evaluation,
    Speed,
    directory_bytes,
    generate_text,
    measure_speed,
    model_bytes,
    peak_rss,
    reset_peak_rss,
)
from lowbit.modules import QuantLinear
from lowbit.stages.journal import check_target

MODEL = "smollm2-135m"
BITS, GROUP = 4, 64
SAMPLES, SEQ_LEN = 24, 512  # of the calibration text
WINDOWS, WINDOW = 10, 1024  # of the held-out text
SPEED_SECONDS = 15.0
PROMPT = "Explain in one sentence why the sky is blue."


@dataclass
class Stage:
    """Seconds that a stage took, and the process's peak resident set in it (since the start, where no reset is possible)."""

    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Running:
    """A model as its user meets it: how fast, how much memory, what it writes."""

    speed: Speed
    bytes: int
    kernels: str
    stage: Stage
    sentence: str

    @property
    def conditions(self) -> str:
        return f"{self.speed.prompt_tokens} prompt and {self.speed.new_tokens} new tokens, {self.kernels}"


@contextmanager
def stage(title: str) -> Iterator[Stage]:
    """Says what begins, and measures it."""
    common.say(f"\n{title}")
    _give_back_memory()
    reset_peak_rss()
    taken, start = Stage(), time.monotonic()
    yield taken
    taken.seconds, taken.peak_bytes = time.monotonic() - start, peak_rss()
    common.say(f"{taken.seconds:.0f} s, peak memory {common.size(taken.peak_bytes)}")


def _give_back_memory() -> None:
    """Frees what earlier stages left, so that the next one's peak is its own; glibc's heap keeps it unless told."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def target(given: Path | None) -> Path:
    """The user's directory, which must be new, or the demo's own, which an earlier demo may have filled."""
    if given is not None:
        check_target(given)
        return given
    own = cache_directory() / "demo" / f"{MODEL}-gptq-w{BITS}-g{GROUP}"
    if own.is_dir():
        common.say(f"removing what an earlier demo made: {own}")
        shutil.rmtree(own)
    return own


def running(model_or_dir: str | Path, title: str) -> Running:
    """Loads a model, alone in memory, times it, and lets it answer."""
    with stage(title) as taken, common.progress() as report:
        report(0, 1, "loading")
        model, tokenizer = lowbit.load(model_or_dir, torch.float32), lowbit.load_tokenizer(model_or_dir)
        speed = measure_speed(model, time_budget_s=SPEED_SECONDS, progress=report)
        report(0, 1, "writing a sentence")
        sentence = generate_text(model, tokenizer, [{"role": "user", "content": PROMPT}], 40)
        return Running(speed, model_bytes(model), kernels(model), taken, " ".join(sentence.split()))


def kernels(model: PreTrainedModel) -> str:
    """The kernels that run the packed linears, by name."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    chosen = {reason.kernel for module in packed for reason in module.explain() if reason.why_not is None}
    return f"{', '.join(sorted(chosen))} kernel" if chosen else "dense"


def quantize(out: Path) -> tuple[lowbit.QuantizeReport, dict[str, Stage]]:
    text = common.text_or_default(None, "calibration")
    continued = out.with_name(f"{out.name}.partial").is_dir()
    verb = "Continuing to quantize" if continued else "Quantizing"
    with stage(f"{verb} by GPTQ to {BITS} bits, groups of {GROUP}, on {text}, into {out}") as taken:
        with common.progress() as report:
            recipe = lowbit.recipe("gptq", bits=BITS, group_size=GROUP)
            result = lowbit.quantize(MODEL, recipe, text, out=out, samples=SAMPLES, seq_len=SEQ_LEN, progress=report)
    common.warn(result.warnings)
    return result, {"quantizing, the rest of it" if continued else "quantizing": taken}


def compare(out: Path) -> tuple[Evaluation, Stage]:
    text = common.text_or_default(None, "evaluation")
    with stage("Comparing the packed model with the original on text that neither was calibrated on") as taken:
        with common.progress() as report:
            report(0, 1, "loading")
            judged = lowbit.evaluate(out, text, seq_len=WINDOW, windows=WINDOWS, against=MODEL, progress=report)
    return judged, taken


def summary(out: Path, before: Running, after: Running, judged: Evaluation, stages: dict[str, Stage]) -> Table:
    """Everything measured, before and after."""
    columns = ("original, float32", f"GPTQ, {BITS} bits, packed")
    table = common.table(MODEL, *columns, numbers=columns)
    source, bits = directory_bytes(locate(MODEL)[1]), bits_report(out)
    low, high = judged.kl_interval or (judged.kl, judged.kl)
    table.add_row("perplexity", f"{judged.reference_perplexity:.2f}", f"{judged.perplexity:.2f}")
    table.add_row("KL from the original, nats a token", "0", f"{judged.kl:.4f} ({low:.4f} to {high:.4f})")
    table.add_row("top-1 agreement with the original", "100%", f"{judged.top1_agreement:.1%}")
    table.add_section()
    table.add_row("bytes on disk", common.size(source.total), common.size(directory_bytes(out).total))
    table.add_row("bits per weight of the blocks' linears", "32", f"{bits['bits_per_weight']:.3f}")
    table.add_row("bits per weight of the whole model", "32", f"{bits['model_bits_per_weight']:.3f}")
    table.add_row("bytes of the loaded model", common.size(before.bytes), common.size(after.bytes))
    table.add_row("peak RSS, running", *(common.size(x.stage.peak_bytes) for x in (before, after)))
    table.add_section()
    table.add_row("prefill, tokens/s", *(f"{x.speed.prefill_tokens_per_s:.1f}" for x in (before, after)))
    table.add_row("decode, tokens/s", *(f"{x.speed.decode_tokens_per_s:.1f}" for x in (before, after)))
    table.add_section()
    for name, taken in stages.items():
        table.add_row(f"{name}: seconds, peak RSS", "", f"{taken.seconds:.0f} s, {common.size(taken.peak_bytes)}")
    return table


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="where the checkpoint goes; must be new")
    out = target(parser.parse_args().out)
    before = running(MODEL, f"Running the original, {MODEL}")
    report, quantizing = quantize(out)
    after = running(out, "Running the packed model, reloaded")
    judged, comparing = compare(out)
    stages = quantizing | {"comparing": comparing}
    console = common.console()
    console.print(summary(out, before, after, judged, stages))
    for line in (
        f"calibrated on {report.calibration}",
        f"perplexity, KL, agreement on {judged.text}: {WINDOWS} windows of {WINDOW}; 95 % interval in brackets",
        f"speed on {torch.get_num_threads()} threads: original with {before.conditions}; packed with {after.conditions}",
        "the original comes as a GGUF file of 4-bit groups of 32, expanded to float32 once; its bytes here are the expansion's",
        f"the checkpoint is {out}",
        f"\n{PROMPT}",
        f"original: {before.sentence}",
        f"packed:   {after.sentence}",
        f"\n{time.monotonic() - start:.0f} s in all",
    ):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    common.guarded(main, "interrupted: run the demo again to continue where it stopped")()
