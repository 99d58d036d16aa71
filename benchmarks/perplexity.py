"""Perplexity of SmolLM2-135M under every method of the foundation, at the settings its users compare.

    python benchmarks/perplexity.py --calibration wikitext2.valid.raw --text wikitext2.test.raw [--only NAME]...

Each setting is quantized packed, saved, reloaded packed and evaluated (20 windows of 1024 tokens, protocol ``gptq``).
One JSON line a setting goes into ``benchmarks/results/perplexity.jsonl`` as soon as it is known, and a setting that has
its line is not run again, so the script can be stopped and repeated at any time. The table is rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

import lowbit
from lowbit.evaluate import peak_rss

RESULTS = Path(__file__).parent / "results"
WEIGHT_ONLY = {
    "W4 g64": {"bits": 4, "group_size": 64},
    "W3 g64": {"bits": 3, "group_size": 64},
    "W2 g64": {"bits": 2, "group_size": 64},
    "W3 per channel": {"bits": 3, "group_size": None},
}
LEARNING = {"epochs": 4, "batch": 4, "amp": True}  # 32 steps a block; the authors take 20 epochs of batch 1
METHODS = {
    "rtn": {},
    "gptq": {"mse": False, "order": "none"},  # the authors' own
    "gptq mse, order=group": {},
    "awq": {"windows": 4},
    "omniquant": {**LEARNING, "clip_lr": 5e-2},
}
ACTIVATIONS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A4": (4, 4)}
ACTIVATION_METHODS = {
    "rtn": {"group_size": None, "symmetric": True},
    "smoothquant": {"alpha": 0.5},
    "omniquant": {**LEARNING, "clip_lr": 5e-2, "transform_lr": 1e-2},
}


def settings() -> dict[str, tuple[str, dict]]:
    """Name -> (method, options), cheapest first."""
    found = {}
    for method, options in METHODS.items():
        for label, bits in WEIGHT_ONLY.items():
            found[f"{method}, {label}"] = (method.split()[0], {**bits, **options})
    for method, options in ACTIVATION_METHODS.items():
        for label, (w, a) in ACTIVATIONS.items():
            found[f"{method}, {label}"] = (method, {"bits": w, "activation_bits": a, **options})
    return dict(
        sorted(found.items(), key=lambda item: ["rtn", "smoothquant", "gptq", "awq", "omniquant"].index(item[1][0]))
    )


def run(name: str, method: str, options: dict, calibration: str, text: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "quantized"
        start = time.perf_counter()
        report = lowbit.quantize(
            "smollm2-135m", lowbit.recipe(method, **options), calibration, out=out, max_kl=1e9, allow_broken=True
        )
        seconds = time.perf_counter() - start
        result = lowbit.evaluate(out, text, protocol="gptq", seq_len=1024, windows=20)
        shutil.rmtree(out)
    return {
        "setting": name,
        "perplexity": result.perplexity,
        "interval": result.perplexity_interval,
        "bits_per_weight": report.bits_per_weight,
        "calibration_kl": report.kl,
        "bytes": report.bytes,
        "quantize_seconds": round(seconds, 1),
        "peak_rss_bytes": peak_rss(),
        "threads": torch.get_num_threads(),
        "recipe": report.recipe.to_dict(),
        "calibration": report.calibration,
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
    }


def write_table(lines: list[dict], path: Path) -> None:
    rows = ["| setting | perplexity | true bits per weight | quantize, s |", "|---|---|---|---|"]
    for line in lines:
        rows.append(
            f"| {line['setting']} | {line['perplexity']:.5g} | {line['bits_per_weight']:.3f} | {line['quantize_seconds']:.0f} |"
        )
    head = (
        "# SmolLM2-135M: perplexity on WikiText-2 test, first 20 windows of 1024 tokens\n\n"
        "Written by `benchmarks/perplexity.py`; calibrated on 32 windows of 512 tokens of WikiText-2 validation. Full "
        "precision: 23.23. Seconds are of a shared machine with 2 cores: compare nothing finer than a factor.\n\n"
    )
    path.write_text(head + "\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--only", action="append", help="part of a setting's name; may be repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "perplexity.jsonl"
    for name, (method, options) in settings().items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if any(line["setting"] == name for line in lines):
            continue
        line = run(name, method, options, arguments.calibration, arguments.text)
        with file.open("a") as stream:
            stream.write(json.dumps(line, sort_keys=True) + "\n")
        print(
            f"{name}: {line['perplexity']:.3f} at {line['bits_per_weight']:.3f} bits, {line['quantize_seconds']} s",
            flush=True,
        )
        order = list(settings())
        done = [json.loads(each) for each in file.read_text().splitlines()]
        write_table(sorted(done, key=lambda each: order.index(each["setting"])), RESULTS / "perplexity.md")


if __name__ == "__main__":
    main()
