"""Every method on a small model that was really trained (stories260K): golden rows, and the order that papers report.

The rows in ``real_tiny_model.json`` are perplexities on real texts after quantizing, saving and reloading. They change only
on purpose: ``python tests/golden/test_real_tiny_model.py`` writes them again.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn.functional import cross_entropy

import lowbit

MODEL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "models" / "stories260K"
GOLDEN = Path(__file__).with_suffix(".json").with_name("real_tiny_model.json")
pytestmark = pytest.mark.skipif(
    not MODEL.exists(), reason="the small trained model is not beside the project (../shared/data)"
)

ROWS = {
    "rtn W4 g32": ("rtn", {"bits": 4, "group_size": 32}),
    "rtn W3 g32": ("rtn", {"bits": 3, "group_size": 32}),
    "gptq W3 g32": ("gptq", {"bits": 3, "group_size": 32, "mse": False, "order": "none"}),
    "gptq W3 g32 mse group": ("gptq", {"bits": 3, "group_size": 32}),
    "awq W3 g32": ("awq", {"bits": 3, "group_size": 32}),
    "awq+gptq W3 g32": ("awq+gptq", {"bits": 3, "group_size": 32, "clip": False, "mse": False, "order": "none"}),
    "omniquant W3 g32": ("omniquant", {"bits": 3, "group_size": 32, "epochs": 4, "clip_lr": 0.05}),
    "rtn W8A8": ("rtn", {"bits": 8, "group_size": None, "symmetric": True, "activation_bits": 8}),
    "smoothquant W8A8": ("smoothquant", {}),
    "smoothquant W8A8 static": ("smoothquant", {"level": "O3"}),
    "smoothquant+gptq W8A8": (
        "smoothquant+gptq",
        {"bits": 8, "group_size": None, "activation_bits": 8, "mse": False, "order": "none"},
    ),
    "rtn W4A4": ("rtn", {"bits": 4, "group_size": None, "symmetric": True, "activation_bits": 4}),
    "omniquant W4A4": ("omniquant", {"bits": 4, "activation_bits": 4, "epochs": 4, "clip_lr": 0.05}),
}


def _tokens(kind: str) -> list[list[int]]:
    return json.loads((MODEL / "tokens.json").read_text())[kind]


def _perplexity(model) -> float:
    nll, count = 0.0, 0
    with torch.no_grad():
        for text in _tokens("real"):
            ids = torch.tensor(text)
            nll += cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
            count += len(text) - 1
    return math.exp(nll / count)


SEEDS = {"omniquant W3 g32": 3}
"""Rows that are means over so many seeds: with one, windows in another order or a sum rounded elsewhere moved this one between
4.99 and 5.23."""


@cache
def _row(name: str) -> tuple[float, float]:
    """(perplexity, bits per weight)."""
    method, options = ROWS[name]
    ids, found = torch.tensor(_tokens("generated")[:24]), []
    for seed in range(SEEDS.get(name, 1)):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "quantized"
            recipe = lowbit.recipe(method, **options).with_blockwise(compute="float32")  # the same on all processors
            report = lowbit.quantize(MODEL, replace(recipe, seed=seed), ids, out=out, max_kl=20)
            found.append(_perplexity(lowbit.load(out, torch.float32)))
    return mean(found), report.bits_per_weight


def test_the_original_reads_the_real_texts_as_its_source_says():
    assert _perplexity(lowbit.load(MODEL, torch.float32)) == pytest.approx(3.55, abs=0.01)


@pytest.mark.parametrize("name", ROWS)
def test_every_golden_row_is_reproduced(name):
    perplexity, bits = _row(name)
    golden = json.loads(GOLDEN.read_text())[name]
    # Processors round sums differently, and gradient steps amplify it: one commit gave 5.14 and 5.04 on two machines.
    tolerance = 0.03 if name.startswith("omniquant") else 0.01
    assert perplexity == pytest.approx(golden["perplexity"], rel=tolerance)
    assert bits == pytest.approx(golden["bits_per_weight"], abs=1e-4)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("rtn W4 g32", "rtn W3 g32"),
        ("gptq W3 g32", "rtn W3 g32"),
        ("awq W3 g32", "rtn W3 g32"),
        ("awq+gptq W3 g32", "awq W3 g32"),
        ("omniquant W3 g32", "rtn W3 g32"),
        ("rtn W8A8", "rtn W4A4"),
        ("omniquant W4A4", "rtn W4A4"),
    ],
)
def test_methods_come_in_the_order_that_their_papers_report(better, worse):
    assert _row(better)[0] < _row(worse)[0]


if __name__ == "__main__":
    rows = {name: dict(zip(("perplexity", "bits_per_weight"), _row(name), strict=True)) for name in ROWS}
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
    print(GOLDEN.read_text())
