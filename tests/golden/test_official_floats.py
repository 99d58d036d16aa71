"""Floating formats against what the authors' code of LLM-FP4, and bitsandbytes, reached on real layers.

The records of LLM-FP4 are of its MinMax classes. Their exponent bias is ``2**E - log2(max)``, where the format's largest
number is reached at ``2**E - log2(max) + log2(2 - 2**-M) - 1``: the largest magnitude falls on the number after the
largest one, and what is quantized has ``2**bits + 1`` values, which ``bits`` bits cannot hold. With that grid the records
are met to four digits (first test); ours, with the values that the bits hold, meets their output error by searching the
range (second test).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.numerics import Clipped, Float, MinMax, PerChannel, Spec, quantize

import layers
from blocks import errors_of, place_of

pytestmark = pytest.mark.skipif(layers.missing() is not None, reason=layers.missing() or "")
MINMAX = layers.official("LLM-FP4 MinMax")
# Here output error hangs on few channels, and the number more is worth 5 % of it; see the third test.
BEYOND = [r for r in MINMAX if "A8" in r["setting"] and r["layer"] == "model.layers.14.mlp.down_proj"]
FP4 = [r for r in layers.official("bitsandbytes") if r["setting"].startswith("FP4")]


def _name(record: dict) -> str:
    return f"{record['setting']} {record['layer'].removeprefix('model.layers.')}"


def _one_beyond(w_OI: Tensor, e: int, m: int) -> Tensor:
    """Rounding with the largest magnitude of each row at the first number that the format no longer has."""
    bias = 2**e - w_OI.abs().amax(1, keepdim=True).log2()
    step = torch.exp2((w_OI.abs().log2() + bias).floor().clamp(min=1) - m - bias)
    return step * (w_OI / step).round()


@pytest.mark.parametrize("record", layers.chosen([r for r in MINMAX if "A4" in r["setting"]]), ids=_name)
def test_the_minmax_classes_have_a_number_more_than_their_bits_hold(record):
    w_OI = layers.gather()[f"{record['layer']}.weight"]
    e, m = int(record["setting"][4]), int(record["setting"][6])
    theirs = _one_beyond(w_OI, e, m)
    ours = quantize(w_OI, Spec(Float(e, m), PerChannel(), scale_dtype="float32"), MinMax()).dequantize()
    lost, ours_lost = ((w_OI - q).double().square().sum() / w_OI.double().square().sum() for q in (theirs, ours))
    assert lost.item() == pytest.approx(record["rel_w"], rel=2e-4)
    assert (
        max(len(row.unique()) for row in ours) <= 15
        and max(len((row / row.max()).abs().unique()) for row in theirs) > 8
    )
    assert ours_lost > 1.1 * lost


@pytest.mark.parametrize(
    "record",
    [r for r in MINMAX if ".14." in r["layer"] and "E1M2" not in r["setting"] and r not in BEYOND],
    ids=_name,
)
def test_searched_ranges_lose_no_more_than_that_number_more(record):
    block, path = place_of(record)
    formats = {"weight_format": "E2M1", "activation_format": "E4M3" if "A8" in record["setting"] else "E2M1"}
    errors = errors_of(
        "llm-fp4",
        block,
        activation_bits=int(record["setting"][10]),
        channel_bias=False,
        grid=10,
        rounds=2,
        tokens=1024,
        **formats,
    )
    assert errors[path] <= 1.02 * record["rel_out"]


@pytest.mark.parametrize("record", BEYOND, ids=_name)
def test_no_range_of_a_row_makes_up_for_that_number_here(record):
    """Each row takes the share of its range that is best by the Gram matrix of every calibration token."""
    tensors = layers.gather()
    w_OI, seen, unseen = (tensors[f"{record['layer']}.{of}"] for of in ("weight", "calibration", "evaluation"))
    spec = Spec(Float(2, 1), PerChannel(), scale_dtype="float32")
    best = torch.full((len(w_OI),), torch.inf, dtype=torch.float64)
    chosen = torch.empty_like(w_OI)
    for i in range(30, 121):
        share = torch.full((1, 1), i / 100)
        q = quantize(w_OI, spec, Clipped(share, share)).dequantize()
        error = (q - w_OI).double()
        lost = ((error @ seen) * error).sum(1)
        chosen = torch.where((lost < best)[:, None], q, chosen)
        best = torch.minimum(best, lost)
    theirs = layers.output_energy(w_OI - _one_beyond(w_OI, 2, 1), unseen)
    assert layers.output_energy(w_OI - chosen, unseen) > 1.02 * theirs


@pytest.mark.parametrize("record", layers.chosen(FP4), ids=_name)
def test_the_floating_table_of_bitsandbytes_loses_what_it_loses_there(record):
    tensors = layers.gather()
    w_OI, unseen = tensors[f"{record['layer']}.weight"], tensors[f"{record['layer']}.evaluation"]
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    linear.load_state_dict({"weight": w_OI})
    recipe = lowbit.recipe("nf4", levels="fp4", double_quant="double" in record["setting"])
    q = lowbit.quantize_linear(linear, None, recipe)
    rest = w_OI - q.effective_weight()
    assert (rest.square().sum() / w_OI.square().sum()).item() == pytest.approx(record["rel_w"], rel=5e-4)
    lost = layers.output_energy(rest, unseen) / layers.output_energy(w_OI, unseen)
    # Weights half way between two levels go either way, by the last bit of their scale.
    assert lost == pytest.approx(record["rel_out"], rel=5e-3 if "double" in record["setting"] else 1e-3)
    assert q.bits_per_weight == pytest.approx(record["bits_per_weight"], abs=2e-3)
