"""NF4 against codes that bitsandbytes wrote (bitsandbytes.json says with which version and how).

Blocks cross the borders of rows, the last is short, some are all zero and the sizes of others span 30.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.numerics import DYNAMIC_MAP, quantize

RECORD = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text())
X = torch.tensor(RECORD["x_times_1e4"]).float() / 1e4


def _ours(double: bool):
    recipe = lowbit.recipe("nf4", double_quant=double)
    linear = torch.nn.Linear(X.shape[1], X.shape[0], bias=False)
    linear.load_state_dict({"weight": X})
    return lowbit.quantize_linear(linear, None, recipe).qtensor()


@pytest.mark.parametrize("double", [False, True])
def test_codes_are_those_of_bitsandbytes_bit_by_bit(double):
    theirs = RECORD["double" if double else "single"]
    assert "".join(f"{code:x}" for code in _ours(double).codes.flatten().tolist()) == theirs["codes"]


def test_decoded_weights_are_those_of_bitsandbytes_bit_by_bit():
    assert torch.equal(_ours(False).dequantize().flatten(), torch.tensor(RECORD["single"]["dequantized"]))


def test_the_map_of_quantized_scales_is_that_of_bitsandbytes():
    assert torch.equal(torch.tensor(DYNAMIC_MAP.values), torch.tensor(RECORD["dynamic_map"]))


def test_quantized_scales_have_their_mean_and_their_maximum_and_are_nearest():
    theirs, second = RECORD["double"], _ours(True).second["scale"]
    assert second.mean is not None
    assert second.mean.item() == pytest.approx(theirs["offset"], abs=0)
    assert second.params[0].flatten().tolist() == theirs["absmax2"]
    # Their CPU kernel rounds a scale that lies near the middle of two levels either way; ours is never farther away.
    blocks = torch.nn.functional.pad(X.flatten(), (0, -X.numel() % 64)).view(-1, 64).abs().amax(1)
    centred = (blocks - second.mean) / second.params[0].flatten()
    table = torch.tensor(DYNAMIC_MAP.values)
    ours, their = second.codes.flatten().long(), torch.tensor(theirs["absmax"]).long()
    assert ((table[ours] - centred).abs() <= (table[their] - centred).abs() + 1e-7).all()
    assert (ours == their).float().mean() > 0.8


def test_a_block_of_zeros_does_not_disturb_the_scales_of_others():
    with_zeros = torch.cat([torch.zeros(1, 64), X[4:9, :1].expand(5, 64) * torch.linspace(-1, 1, 64)])
    spec = lowbit.recipe("nf4", double_quant=True).scheme.rules[0].weight
    assert spec is not None
    q = quantize(with_zeros, spec, lowbit.numerics.MinMax())
    error = (q.dequantize() - with_zeros).square().sum() / with_zeros.square().sum()
    assert error < 0.02
    assert q.dequantize()[0].abs().max() < 1e-3 * with_zeros.abs().max()
