"""Attention over packed tokens by Triton is that by decoded tokens. Run by ``test_triton.py`` in a process of its own."""

import pytest
import torch
from test_packed_attention import assert_close, layer_of, query_of

from lowbit.caches import attend_packed, on_gpu
from lowbit.kernels.triton import device
from lowbit.numerics import NF4, Block, Float, Int, Normal, PerGroup, PerToken, Spec

DEVICE = "cpu" if device.INTERPRETED else "cuda"
PAIRS = [
    (Spec(Int(2, zero="real"), Block(32, 1)), Spec(Int(2, zero="real"), PerGroup(32))),
    (Spec(Int(3, zero="real"), Block(24, 8)), Spec(Int(5), PerGroup(24))),
    (Spec(Int(8, symmetric=True), PerToken()), Spec(Int(8, symmetric=True), PerToken())),
    (Spec(Normal(4), PerToken()), Spec(NF4, PerGroup(32))),
    (Spec(Float(4, 3, "fn"), PerToken()), Spec(Int(6), Block(16, 1))),
    (Spec(Int(1), PerToken()), None),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize(
    "options", [{}, {"sink": 3, "key_rotation": "hadamard", "value_rotation": "hadamard", "centred": True}]
)
def test_triton_reads_what_decoding_gives(pair, dim, options):
    layer = layer_of(*pair, dim=dim, count=120, **options).to(DEVICE)
    assert on_gpu.why_not(layer) is None
    for count in (1, 3):
        query = query_of(count=count, dim=dim).to(DEVICE)
        assert_close(attend_packed(query, layer).cpu(), attend_packed(query, layer, compiled=False).cpu(), 1e-4)


def test_padding_and_cropped_blocks_are_left_out():
    layer = layer_of(*PAIRS[0], count=150, recent=32)
    layer.crop(-40)
    layer.update(torch.randn(2, 2, 70, 64), torch.randn(2, 2, 70, 64))
    layer = layer.to(DEVICE)
    mask = torch.ones(2, 1, 2, 180, dtype=torch.bool, device=DEVICE).tril(178)
    mask[1, :, :, :50] = False
    query = query_of(count=2).to(DEVICE)
    assert_close(attend_packed(query, layer, mask).cpu(), attend_packed(query, layer, mask, compiled=False).cpu(), 1e-4)
