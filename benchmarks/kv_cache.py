"""Perplexity, KL and memory of a model through packed caches, and the time of a token behind long texts.

    python benchmarks/kv_cache.py [--model smollm2-135m] [--text FILE] [--windows 4] [--seq-len 1024]
        [--formats "kivi 4" "kivi 2" ...] [--contexts 1024 2048 4096 8000] [--calibration TEXT | --calibrated DIR] [--add]

Quality: every window goes through the cache 32 tokens at a time, as `lowbit evaluate --kv --chunk 32` does; KL is from the same model without
a packed cache. Speed: one sequence, the compiled step, weights packed to 4 bits; the formats take turns in one process, and the
first row is the cache that the model has otherwise, in bfloat16. Results go to benchmarks/results/kv-cache.{json,md}.

    python benchmarks/kv_cache.py --plot kv-cache kv-quality-1k ...

draws what these results say into benchmarks/results/kv-cache.svg: loss and KL against bits, memory and tokens a second against
the length of the text.

    python benchmarks/kv_cache.py --sensitivity --text FILE --formats "kivi 2"

prints the KL that each layer causes where its cache alone is quantized, the largest first: what `--kv-set wide_layers=...` of
kivi needs. Use a text that is not evaluated on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import DynamicCache

import lowbit
from lowbit.decoding.model import cache_argument
from lowbit.evaluation.machine import machine
from lowbit.modules import KVFormats, KVRule
from lowbit.plan.cache import cache_bytes
from lowbit.tables import Table, markdown

RESULTS = Path(__file__).parent / "results"
WINDOWS = {"sink": 64, "recent": 256}
"""Of kv-oscar."""
FEWER = {"sink": 16, "recent": 128}
"""Windows that keep 2 bits below 3 where all is counted, behind 8,192 tokens."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "kv-int 8": ("kv-int", {"bits": 8}),
    "kv-fp8": ("kv-fp8", {}),
    "kivi 8": ("kivi", {"bits": 8}),
    "kv-int 4": ("kv-int", {"bits": 4, "symmetric": False}),
    "kv-rotated 4": ("kv-rotated", {"bits": 4}),
    "kv-turbo 4": ("kv-turbo", {"bits": 4, "recent": 64}),
    "kivi 4": ("kivi", {"bits": 4}),
    "kv-rotated 3": ("kv-rotated", {"bits": 3}),
    "kivi 3": ("kivi", {"bits": 3}),
    "kv-int 2": ("kv-int", {"bits": 2, "symmetric": False}),
    "kv-rotated 2": ("kv-rotated", {"bits": 2}),
    "kivi 2": ("kivi", {"bits": 2}),
    "kivi 2, sinks": ("kivi", {"bits": 2, "sink": 4}),
    "kivi K2 V4": ("kivi", {"key_bits": 2, "value_bits": 4}),
    "kivi K4 V2": ("kivi", {"key_bits": 4, "value_bits": 2}),
    "kv-oscar 4": ("kv-oscar", {"bits": 4}),
    "kv-oscar 3": ("kv-oscar", {"bits": 3}),
    "kv-oscar 2": ("kv-oscar", {"bits": 2}),
    "kv-oscar 2, centred": ("kv-oscar", {"bits": 2, "centred": True}),
    "kv-oscar 3, centred": ("kv-oscar", {"bits": 3, "centred": True}),
    "kv-oscar 4, centred": ("kv-oscar", {"bits": 4, "centred": True}),
    "kivi 2, 64 + 256 whole": ("kivi", {"bits": 2, **WINDOWS}),
    "kivi 3, 64 + 256 whole": ("kivi", {"bits": 3, **WINDOWS}),
    "kivi 2, 16 + 128 whole, groups of 64": ("kivi", {"bits": 2, "group_size": 64, **FEWER}),
    "kivi 2, 16 + 128 whole, groups of 64, keys of 6 layers in 4 bits": (
        "kivi", {"bits": 2, "group_size": 64, "wide_layers": "4,17,18,20,23,24", **FEWER}
    ),
    "kv-oscar 2, centred, 16 + 128 whole": ("kv-oscar", {"bits": 2, "centred": True, **FEWER}),
    "kv-rotated 2, both, 16 + 128 whole": ("kv-rotated", {"bits": 2, "rotate": "both", **FEWER}),
    "kv-rotated 2, both, 64 + 256 whole": ("kv-rotated", {"bits": 2, "rotate": "both", **WINDOWS}),
    "kv-rotated 3, both, 64 + 256 whole": ("kv-rotated", {"bits": 3, "rotate": "both", **WINDOWS}),
    "kv-rotated 2, both, not centred, 64 + 256 whole": (
        "kv-rotated", {"bits": 2, "rotate": "both", "centred": False, **WINDOWS}
    ),
}  # fmt: skip
FASTEST = ("kv-int 8", "kivi 4", "kv-rotated 4", "kivi 2")
FEW = 20  # tokens that are timed
CHUNK = 32  # tokens that every cache reads at a time where quality is measured
PROMPT = 512  # tokens of the text that go in at once


def quality(args: argparse.Namespace, name: str, original: Any, tokenizer: Any) -> dict[str, Any]:
    method, options = FORMATS[name]
    recipe = lowbit.recipe(method, **options)
    if recipe.cache_stages and args.calibrated is None:
        args.calibrated = f"{tempfile.mkdtemp()}/calibrated"
        lowbit.quantize(args.model, recipe, args.calibration, out=args.calibrated, samples=16)
    model = lowbit.load(args.calibrated if recipe.cache_stages else args.model, torch.float32)
    lowbit.decoding.use_cache(model, recipe.scheme.cache)

    def size(formats: KVFormats) -> int:
        return cache_bytes(model.config, formats, args.seq_len, torch.bfloat16) or 0

    start = time.perf_counter()
    found = lowbit.evaluate(
        model, args.text, seq_len=args.seq_len, windows=args.windows, against=original, tokenizer=tokenizer, chunk=CHUNK
    )
    return {
        "name": name,
        "bits": found.cache_bits,
        "held": 16 * size(recipe.scheme.cache) / size(KVFormats()),
        "perplexity": found.perplexity,
        "reference": found.reference_perplexity,
        "log_ratio": found.log_perplexity_difference,
        "kl": found.kl,
        "top1": found.top1_agreement,
        "protocol": found.protocol,
        "seconds": time.perf_counter() - start,
    }


def sensitivity(args: argparse.Namespace, name: str, original: Any, tokenizer: Any) -> dict[int, float]:
    """KL in nats where the cache of one layer alone is quantized, by layer."""
    method, options = FORMATS[name]
    model, spec = lowbit.load(args.model, torch.float32), lowbit.recipe(method, **options).scheme.kv
    found = {}
    for layer in range(model.config.num_hidden_layers):
        lowbit.decoding.use_cache(model, KVFormats(None, (KVRule((layer,), spec),)))
        found[layer] = lowbit.evaluate(
            model,
            args.text,
            seq_len=args.seq_len,
            windows=args.windows,
            against=original,
            tokenizer=tokenizer,
            chunk=128,
        ).kl
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def filled(model: Any, cache: Any, ids: torch.Tensor) -> Any:
    with torch.inference_mode():
        for piece in ids.split(PROMPT, 1):
            model(piece, **{cache_argument(model): cache})
    return cache


def bytes_of(cache: Any) -> int:
    own = getattr(cache, "nbytes", None)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if own is None else own


def speed(args: argparse.Namespace, context: int, tokenizer: Any) -> list[dict[str, Any]]:
    text = Path(args.text).read_text(encoding="utf-8") if Path(args.text).exists() else ""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, : context + 1]
    with tempfile.TemporaryDirectory() as scratch:
        lowbit.quantize(args.model, lowbit.recipe("rtn", bits=4, group_size=64), None, out=f"{scratch}/w4")
        model = lowbit.load(f"{scratch}/w4", torch.bfloat16)
    model.set_attn_implementation("lowbit")
    caches = {"bfloat16": filled(model, DynamicCache(config=model.config), ids[:, :-1])}
    for name in FASTEST:
        method, options = FORMATS[name]
        caches[name] = filled(model, lowbit.kv_cache(model, method, **options), ids[:, :-1])
    times: dict[str, list[float]] = {name: [] for name in caches}
    with torch.inference_mode():
        for _ in range(FEW):
            for name, cache in caches.items():
                start = time.perf_counter()
                model(ids[:, -1:], **{cache_argument(model): cache})
                times[name].append(time.perf_counter() - start)
    plain = median(times["bfloat16"][2:])
    return [
        {
            "name": name,
            "context": context,
            "milliseconds": 1e3 * median(times[name][2:]),
            "ratio": plain / median(times[name][2:]),
            "megabytes": bytes_of(cache) / 1e6,
        }
        for name, cache in caches.items()
    ]


QUALITY = ("cache", "bits", "bits held", "perplexity", "ln ratio", "KL, nats", "same top token")
SPEED = ("cache", "context", "ms a token", "x bfloat16", "MB")


def written(args: argparse.Namespace, rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> str:
    held = "16" if any("held" in row for row in rows) else ""
    plain = (("as the model computes it", "16", held, f"{row['reference']:.3f}", "0", "0", "1") for row in rows[:1])
    packed = (
        (
            row["name"],
            f"{row['bits']:.2f}",
            f"{row['held']:.2f}" if "held" in row else "",
            f"{row['perplexity']:.3f}",
            f"{row['log_ratio']:+.4f}",
            f"{row['kl']:.5f}",
            f"{row['top1']:.3f}",
        )
        for row in rows
    )
    speeds = tuple(
        (
            row["name"],
            f"{row['context']:,}",
            f"{row['milliseconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['megabytes']:.1f}",
        )
        for row in timed
    )
    lines = [
        f"# Packed caches of {args.model}",
        "",
        f"Written by `python benchmarks/kv_cache.py`: {args.windows} windows of {args.seq_len} tokens of {Path(args.text).name}. Bits "
        "count scales and zero points; bits held also count the first and recent tokens that stay whole, at the end of a window.",
        "",
        markdown(Table("", QUALITY, (*plain, *packed)).filled()),
        markdown(Table("", SPEED, speeds)),
        f"Last run: {machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "",
    ]
    return "\n".join(lines)


def keep(args: argparse.Namespace, rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> None:
    """Writes the results, rows in the order of :data:`FORMATS`."""
    rows = sorted(rows, key=lambda row: list(FORMATS).index(row["name"]))
    RESULTS.joinpath(f"{args.name}.json").write_text(json.dumps({"quality": rows, "speed": timed}, indent=1) + "\n")
    RESULTS.joinpath(f"{args.name}.md").write_text(written(args, rows, timed))


def plot(names: list[str], path: Path) -> None:
    """Four plots of the results of ``names``; of a row that several have, the last counts."""
    found = [json.loads(RESULTS.joinpath(f"{name}.json").read_text()) for name in names]
    quality = {row["name"]: row for each in found for row in each["quality"]}
    timed = {(row["name"], row["context"]): row for each in found for row in each["speed"]}
    figure = Figure(figsize=(11, 8), layout="constrained")
    loss, divergence, memory, speed = figure.subplots(2, 2).flat
    for method in sorted({name.split()[0] for name in quality}):
        rows = sorted((r for r in quality.values() if r["name"].split()[0] == method), key=lambda r: r["bits"])
        bits = [r["bits"] for r in rows]
        loss.plot(bits, [max(r["log_ratio"], 1e-5) for r in rows], "o-", label=method)
        divergence.plot(bits, [r["kl"] for r in rows], "o-", label=method)
    for name in dict.fromkeys(name for name, _ in timed):
        contexts = sorted(context for other, context in timed if other == name)
        memory.plot(contexts, [timed[name, c]["megabytes"] for c in contexts], "o-", label=name)
        speed.plot(contexts, [1e3 / timed[name, c]["milliseconds"] for c in contexts], "o-", label=name)
    for axes, x, y in (
        (loss, "bits a number", "increase of ln perplexity"),
        (divergence, "bits a number", "KL, nats a token"),
        (memory, "tokens of text", "MB of the cache"),
        (speed, "tokens of text", "tokens a second"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if axes in (loss, divergence):
            axes.set_yscale("log")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="wikitext2", help="a text, as for lowbit evaluate; a file for --contexts")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 2048, 4096, 8000])
    parser.add_argument("--name", default="kv-cache", help="of the results")
    parser.add_argument("--plot", nargs="+", metavar="NAME", help="draw these results; nothing is measured")
    parser.add_argument("--calibration", default="python-docs", help="text for the formats that need one")
    parser.add_argument("--calibrated", help="a checkpoint that carries their calibration already")
    parser.add_argument("--sensitivity", action="store_true", help="the KL of each layer alone; nothing is written")
    parser.add_argument("--add", action="store_true", help="keep earlier rows of this name that are not measured again")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, RESULTS / "kv-cache.svg")
        return
    console, tokenizer = Console(), lowbit.load_tokenizer(args.model)
    original = lowbit.load(args.model, torch.float32)
    if args.sensitivity:
        for name in args.formats:
            for layer, kl in sensitivity(args, name, original, tokenizer).items():
                console.print(f"{name}: layer {layer}, KL {kl:.5f}")
        return
    timed = [row for context in args.contexts for row in speed(args, context, tokenizer)]
    earlier = RESULTS / f"{args.name}.json"
    rows: list[dict[str, Any]] = json.loads(earlier.read_text())["quality"] if args.add and earlier.exists() else []
    rows = [row for row in rows if row["name"] not in args.formats]
    for name in args.formats:
        rows.append(quality(args, name, original, tokenizer))
        console.print(
            f"{name}: perplexity {rows[-1]['perplexity']:.3f}, KL {rows[-1]['kl']:.5f}, {rows[-1]['seconds']:.0f} s"
        )
        keep(args, rows, timed)
    keep(args, rows, timed)
    console.print(written(args, rows, timed))


if __name__ == "__main__":
    main()
