"""OWQ and LUT-GEMM against the authors' own code in a block with massive activations (protocol in `layers.py`).

One channel of down_proj's input holds 79 % of its energy there, so the output error is the error of that one column. A
method that reads inputs must see that; for one that does not, only the error of the weights is to be compared.
"""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.methods.owq import owq
from lowbit.numerics import Gram, KeptColumns

from layers import MASSIVE, gather, missing, official, output_energy

RECORDS = official("OWQ", "BCQ", where="down_proj", file="official28.json")
pytestmark = pytest.mark.skipif(bool(missing()) or not RECORDS, reason=missing() or "official28.json is absent")
OWQ = [r for r in RECORDS if r["method"] == "OWQ" and "k=8 mse" not in r["setting"] and "minmax" not in r["setting"]]
BCQ = [r for r in RECORDS if r["method"] == "BCQ" and "rounds15" in r["setting"]]


@pytest.fixture(scope="module")
def tensors():
    return gather(MASSIVE)


def _solve(record, recipe, tensors):
    """Our relative error of the output and of the weight over the official ones, and the kept columns."""
    w, seen, unseen = (tensors[f"{record['layer']}.{kind}"] for kind in ("weight", "calibration", "evaluation"))
    (rule,) = recipe.scheme.rules
    solution = recipe.steps[-1].solver.solve(w, rule.weight, {Gram(): seen.float()})
    q = solution.q.dequantize()
    for term in solution.side:
        q = q + term.dense((w.shape[0], w.shape[1]))
    output = output_energy(w - q, unseen) / output_energy(w, unseen) / record["rel_out"]
    weight = ((w - q).square().sum() / w.square().sum()).item() / record["rel_w"]
    return output, weight, sum(len(term.index) for term in solution.side if isinstance(term, KeptColumns))


@pytest.mark.parametrize("record", OWQ, ids=lambda r: r["setting"])
def test_as_many_weak_columns_lose_no_more_than_the_authors(record, tensors):
    rows, columns = tensors[f"{record['layer']}.weight"].shape
    kept = round((record["bits_per_weight"] - 3 - 20 / columns) / (16 / columns + 32 / (rows * columns)))
    output, _, count = _solve(record, owq(kept_columns=kept), tensors)
    assert output <= 1.02 and count == kept


def test_a_target_that_holds_no_column_says_which_one_does(tensors):
    layer = f"model.layers.{MASSIVE}.mlp.down_proj"
    recipe = owq(target_bits=3.01, mse=False)
    solution = recipe.steps[-1].solver.solve(
        tensors[f"{layer}.weight"][:32], recipe.scheme.rules[0].weight, {Gram(): torch.eye(1536)}
    )
    assert any("no column kept" in note and "bits on one is kept" in note for note in solution.notes)


@pytest.mark.parametrize("record", BCQ, ids=lambda r: r["setting"])
def test_binary_codes_have_the_smaller_weight_error_and_with_inputs_a_tenth_of_the_output_error(record, tensors):
    options = {"bits": int(record["setting"][0]), "group_size": 64}
    output, weight, _ = _solve(record, lowbit.recipe("lut-gemm", **options), tensors)
    assert weight <= 1 and output < 2
    some = {name: value[:48] if name.endswith("weight") else value for name, value in tensors.items()}
    plain, second = (
        _solve(record, lowbit.recipe("lut-gemm", second_order=each, **options), some)[0] for each in (False, True)
    )
    assert second < 0.1 * plain
