"""Tokens per second of a whole model, one token at a time: packed, by its compiled step, beside transformers.

    lowbit quantize smollm2-135m --method rtn --bits 4 --group-size 64 -o smollm2-w4
    python benchmarks/decode.py smollm2-w4 [--original smollm2-135m] [--rounds 7]
        [--gguf model.gguf]... [--llama-python PYTHON]

All models are in one process and take turns, so that what else the machine does meets all of them; a figure is the median of
the rounds. `forward` is a greedy loop around the model, `generate` is transformers' own, whose bookkeeping is in it.
With --gguf, llama.cpp takes its turns too, in
a process of its own (benchmarks/llama_cpp_speed.py) that no thread of this one disturbs. Results go to benchmarks/results/decode.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

import lowbit
from lowbit import decoding
from lowbit.evaluation import measure_speed
from lowbit.evaluation.machine import machine
from lowbit.tables import Table, markdown

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW = 16, 16


def generated(model: Any) -> float:
    """Tokens per second of `generate`, its prefill not counted."""
    prompt = torch.arange(PROMPT)[None]
    seconds = []
    for tokens in (1, NEW + 1):
        start = time.perf_counter()
        # min_new_tokens would make transformers look at all scores of each token
        written = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
        if written.shape[1] != PROMPT + tokens:
            raise SystemExit(
                f"the model ended after {written.shape[1] - PROMPT} of {tokens} tokens; choose another prompt"
            )
    return NEW / (seconds[1] - seconds[0])


def forwarded(model: Any) -> float:
    """Tokens per second of forward passes."""
    return measure_speed(model, PROMPT, NEW, repeats=1).decode_tokens_per_s


def without_step(measure: Callable[[Any], float], model: Any) -> float:
    """The same of a model that runs as if it had no compiled step."""
    decoding.uninstall(model)
    try:
        return measure(model)
    finally:
        decoding.install(model)


def of_llama_cpp(python: str, file: str) -> float:
    """Tokens per second of llama.cpp."""
    script = str(Path(__file__).with_name("llama_cpp_speed.py"))
    command = [python, script, file, "--threads", str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["tokens_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", help="a packed checkpoint")
    parser.add_argument("--original", default="smollm2-135m", help="the model it was made from")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gguf", action="append", default=[], help="a file for llama.cpp; may be repeated")
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    started = {"commit": commit, "load_average": [os.getloadavg()[0]]}
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rows: dict[str, tuple[Any, Callable[[Any], float]]] = {}
    for name, dtype in types.items():
        packed, original = lowbit.load(arguments.packed, dtype), lowbit.load(arguments.original, dtype)
        rows[f"packed, {name}, forward"] = packed, forwarded
        rows[f"packed, {name}, generate"] = packed, generated
        rows[f"packed, {name}, without the step, forward"] = packed, lambda m: without_step(forwarded, m)
        rows[f"transformers, {name}, forward"] = original, forwarded
        rows[f"transformers, {name}, generate"] = original, generated
    for file in arguments.gguf:
        rows[f"llama.cpp, {Path(file).stem}, eval"] = file, lambda file: of_llama_cpp(arguments.llama_python, file)
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, (model, measure) in rows.items():
            speeds[name].append(measure(model))
    write(arguments, {name: median(found) for name, found in speeds.items()}, next(iter(rows.values()))[0], started)


def write(arguments: argparse.Namespace, speeds: dict[str, float], packed: Any, started: dict[str, Any]) -> None:
    """The table, on the screen, as JSON and as Markdown."""
    about = machine()
    commit, loads = started["commit"], [*started["load_average"], os.getloadavg()[0]]
    result = {"packed": Path(arguments.packed).name, "original": arguments.original, "rounds": arguments.rounds}
    result |= {"prompt_tokens": PROMPT, "new_tokens": NEW, "tokens_per_s": speeds, "machine": about, "commit": commit}
    result["load_average"] = loads
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = []
    for name, speed in speeds.items():
        base = speeds[f"transformers, bf16, {'generate' if name.endswith('generate') else 'forward'}"]
        rows.append((name, f"{speed:.1f}", f"{speed / base:.1f}"))
    lines = [
        f"# Tokens per second, one at a time: {arguments.original}, 4 bits in groups of 64",
        "",
        f"Written by `python benchmarks/decode.py`: {PROMPT} prompt and {NEW} new tokens, medians of {arguments.rounds} rounds in "
        "turns.",
        f"{decoding.explain(packed)} Load average of the machine, before and after: {loads[0]:.1f} and {loads[1]:.1f}; where",
        "others were running, ratios are off too: many short parallel regions wait for cores more often than one long one does.",
        "",
        markdown(Table("", ("", "tokens/s", "x transformers bf16"), tuple(rows))),
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, commit {commit}",
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / "decode.md").write_text(text)
    Console().print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
