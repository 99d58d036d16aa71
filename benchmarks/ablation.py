"""What each ingredient of the composed recipes gives, on text that calibration does not use.

    python benchmarks/ablation.py --text wikitext2.valid.raw [--of weights|activations|qllm|levels] [--bits 3] [--only PART]...

Every row quantizes SmolLM2-135M on the first 32 windows of 512 tokens of the text and measures perplexity on the next 16; rows that
end in tuning are measured before it too. Recipes are chosen by these figures; the test text is for the tables of `lowbit
compare` alone. Results go to benchmarks/results/ablation.{jsonl,md}; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.checkpoints.source import open_model
from lowbit.numerics import to_dict
from lowbit.recipes import Blockwise, Recipe, as_recipe
from lowbit.scheme import FormatRule
from lowbit.solve import Nearest
from lowbit.stages.descent import Descent
from lowbit.steps import Solve
from lowbit.tables import Table, markdown
from lowbit.training import Answer, Text

MODEL = "smollm2-135m"
HERE = Path(__file__).parent
RESULTS = HERE / "results"
CALIBRATION, HELD, LENGTH = 32, 16, 512
TUNE = {
    "type": "Train",
    "what": {"type": "StoredFloats"},
    "objective": {"type": "OriginalKL"},
    "epochs": 3,
    "amp": True,
}


def of_weights(bits: int) -> dict[str, Any]:
    """Label -> recipe, each with one ingredient more or another."""
    grouped = {"bits": bits, "group_size": 64}
    channel = {"bits": bits, "group_size": None, "order": "act"}
    found: dict[str, Any] = {
        "gptq, groups of 64": {"method": "gptq", "options": grouped, "then": [TUNE]},
        "rotated gptq, groups of 64": {"method": "quip+gptq", "options": grouped},
        "gptq, per channel": {"method": "gptq", "options": channel},
        "rotated gptq, per channel": {"method": "quip+gptq", "options": channel, "then": [TUNE]},
    }
    normal = as_recipe("w3-normal-tuned")
    found["rotated gptq, normal levels, per channel"] = normal.with_overrides([{"match": "*", "bits": bits}])
    for file in sorted((HERE / "recipes").glob(f"w{bits}.*-allocated.yaml")):
        found[f"rotated gptq, normal levels, per channel, {file.stem}"] = file
    return {f"W{bits}, {label}": recipe for label, recipe in found.items()}


def of_activations(bits: int) -> dict[str, Any]:
    """The composed recipe for weights and activations, with parts left out."""
    whole = as_recipe("w4a4-rotated-tuned").with_overrides([{"match": "*", "bits": bits, "activation_bits": bits}])
    rotation, solve = whole.steps
    nearest = Solve(Nearest(solve.solver.fit))
    parts = {"rounded to nearest": (nearest,), "gptq": (solve,), "rotated, rounded to nearest": (rotation, nearest)}
    found = {label: replace(whole, stages=(Blockwise(steps),)) for label, steps in parts.items()}
    return {f"W{bits}A{bits}, {label}": recipe for label, recipe in (found | {"rotated gptq": whole}).items()}


def of_qllm(bits: int) -> dict[str, Any]:
    """The table of QLLM's paper. Without the adaptive search an input takes one threshold, or none where that loses more.

    The correction is learned in fewer and larger steps than the method takes by itself: the budget of two processor cores.
    """
    base = {"bits": bits, "activation_bits": bits, "rank": 0, "threshold_steps": 1}
    adaptive = base | {"threshold_steps": 20}
    learned = adaptive | {"rank": 4, "epochs": 2, "batch": 4, "lr": 2e-3}
    parts = {
        "channels as they are": base | {"channel_ratio": 0.0},
        "channel disassembly, layers grow": base | {"assembly": "none"},
        "disassembly and assembly": base,
        "disassembly and pruning": base | {"assembly": "prune"},
        "disassembly, assembly, adaptive threshold": adaptive,
        "disassembly, assembly, adaptive threshold, error correction kept": learned,
        "disassembly, assembly, adaptive threshold, error correction folded": learned | {"fold": True},
    }
    return {f"QLLM W{bits}A{bits}, {label}": {"method": "qllm", "options": options} for label, options in parts.items()}


def of_levels(bits: int) -> dict[str, Any]:
    """SmoothQuant's O1 and O2, and which inputs lose what lies between: each in turn has one range for all tokens."""
    levels = {
        level: lowbit.recipe("smoothquant", bits=bits, activation_bits=bits, level=level) for level in ("O1", "O2")
    }
    whole, base = levels["O2"].scheme.rules[0], levels["O1"]
    places = {"behind norms": "behind_norm", "of the output projection": "o", "of the last linear of the MLP": "down"}
    parts = {}
    for place, match in places.items():
        one = FormatRule(match=match, weight=whole.weight, activation=whole.activation)
        parts[f"O1, inputs {place} per tensor"] = replace(base, scheme=base.scheme.with_rules(one))
    return {f"SmoothQuant W{bits}A{bits}, {label}": recipe for label, recipe in (levels | parts).items()}


TABLES = {
    "weights": (of_weights, 3),
    "activations": (of_activations, 4),
    "qllm": (of_qllm, 4),
    "levels": (of_levels, 8),
}
"""Recipes of a table, and the width it is for unless another is asked for."""


@torch.no_grad()
def perplexity(model: nn.Module, held_NT: Tensor) -> float:
    total = sum(cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]).item() for ids in held_NT)
    return math.exp(total / len(held_NT))


def measure(label: str, recipe: Recipe, ids_NT: Tensor, original: nn.Module) -> list[dict]:
    """The row's lines: as quantized, and tuned where the recipe tunes."""
    calibration, held = ids_NT[:CALIBRATION], ids_NT[CALIBRATION:]
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        start = time.perf_counter()
        plain = replace(recipe, stages=recipe.stages[:1])
        report = lowbit.quantize(MODEL, plain, calibration, out=Path(folder) / "q", max_kl=math.inf, allow_broken=True)
        model = lowbit.load(Path(folder) / "q", dtype=torch.float32)
    line = {"label": label, "recipe": to_dict(recipe), "tuned": False, "bits": report.bits_per_weight}
    lines = [line | {"seconds": time.perf_counter() - start, "perplexity": perplexity(model, held)}]
    if recipe.stages[1:]:
        start = time.perf_counter()

        def answer(i: int) -> Answer:
            with torch.no_grad():
                return Answer(original(calibration[i : i + 1]).logits[0])

        for stage in recipe.stages[1:]:
            Descent(model, stage, Text(calibration, answer), seed=recipe.seed).run()
        seconds = time.perf_counter() - start
        lines.append(line | {"tuned": True, "seconds": seconds, "perplexity": perplexity(model, held)})
    return lines


COLUMNS = ("recipe", "bits per weight", "perplexity", "loss", "seconds of this step")


def write(lines: list[dict], full: float) -> None:
    cells = (
        (
            f"{x['label']}{', tuned' if x['tuned'] else ''}",
            f"{x['bits']:.3f}",
            f"{x['perplexity']:.3f}",
            f"{math.log(x['perplexity'] / full):.4f}",
            "" if x["seconds"] is None else str(round(x["seconds"])),
        )
        for x in sorted(lines, key=lambda x: (x["label"].split(",")[0], -x["perplexity"]))
    )
    rows = [
        "# What each ingredient gives: SmolLM2-135M, perplexity on 16 windows of 512 tokens that calibration did not use",
        "",
        f"Written by `python benchmarks/ablation.py`. Full precision: {full:.3f}. Loss: nats a token over full precision.",
        "",
        markdown(Table("", COLUMNS, tuple(cells))),
    ]
    (RESULTS / "ablation.md").write_text("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, required=True, help="of which the first windows calibrate and the next judge"
    )
    parser.add_argument("--of", choices=TABLES, default="weights", help="what is taken apart (default: weights)")
    parser.add_argument("--bits", type=int, action="append", default=[], help="widths; may be repeated")
    parser.add_argument("--only", action="append", default=[], help="part of a label; may be repeated")
    arguments = parser.parse_args()
    console, file = Console(), RESULTS / "ablation.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    source = open_model(MODEL)
    original = source.load_full().requires_grad_(False)
    tokens = source.tokenizer()(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids_NT = torch.tensor(tokens[: (CALIBRATION + HELD) * LENGTH]).view(-1, LENGTH)
    full = perplexity(original, ids_NT[CALIBRATION:])
    console.print(f"full precision: {full:.3f}")
    recipes, usual = TABLES[arguments.of]
    for bits in arguments.bits or [usual]:
        for label, given in recipes(bits).items():
            recipe = as_recipe(given)
            known = any(x["label"] == label and x["recipe"] == to_dict(recipe) for x in lines)
            if known or (arguments.only and not any(part in label for part in arguments.only)):
                continue
            for line in measure(label, recipe, ids_NT, original):
                console.print(
                    f"{label}{', tuned' if line['tuned'] else ''}: {line['perplexity']:.3f} at {line['bits']:.3f} bits"
                )
                lines.append(line)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            write(lines, full)


if __name__ == "__main__":
    main()
