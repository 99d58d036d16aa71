"""What a process holds of a packed layer decodes to the rows and columns of the whole."""

from __future__ import annotations

import pytest
import torch

from lowbit.layouts import pack_qtensor, unpack_qtensor
from lowbit.modules import LinearDescription, QuantLinear
from lowbit.numerics import Int, PerChannel, PerGroup, PerTensor, QTensor, Spec
from lowbit.numerics.grids import NF4
from lowbit.serving.vllm_plugin.shards import cut, joined

SPECS = [
    Spec(Int(3), PerGroup(16)),
    Spec(Int(4, symmetric=True), PerChannel()),
    Spec(Int(5), PerChannel(), scale_dtype="float32"),
    Spec(NF4, PerGroup(16)),
]
WHOLE = (24, 48)


def layer(spec: Spec) -> tuple[LinearDescription, dict[str, torch.Tensor], torch.Tensor]:
    """A description, its tensors, and the decoded weight."""
    weight = torch.randn(WHOLE, generator=torch.Generator().manual_seed(0))
    granules = spec.granularity.split(weight)
    raw = spec.grid.from_range(granules.amin(1, keepdim=True), granules.amax(1, keepdim=True))
    stored = spec.as_stored(raw, spec.granularity.param_shape(WHOLE)[1])
    codes = spec.granularity.join(spec.grid.encode(granules, stored), WHOLE).to(torch.uint8)
    made = QTensor.fitted(codes, raw, spec)
    return LinearDescription(spec, WHOLE), pack_qtensor(made), made.dequantize()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rows", [(0, 24), (0, 5), (5, 24)])
@pytest.mark.parametrize("columns", [(0, 48), (16, 48), (0, 32)])
def test_rows_and_columns_of_a_layer_decode_to_the_same_bits(spec, rows, columns):
    description, tensors, decoded = layer(spec)
    part, held = cut(description, tensors, rows, columns)
    assert {name: (tuple(t.shape), t.dtype) for name, t in held.items()} == part.layout()
    found = unpack_qtensor(held, part.spec, part.shape).dequantize()
    assert torch.equal(found, decoded[slice(*rows), slice(*columns)])


def test_a_group_is_not_cut():
    description, tensors, _ = layer(SPECS[0])
    with pytest.raises(ValueError, match="groups of 16 inputs do not end at 0 and 24"):
        cut(description, tensors, (0, 24), (0, 24))


def test_a_scale_of_the_whole_matrix_is_not_cut():
    description, tensors, _ = layer(Spec(Int(4), PerTensor()))
    assert cut(description, tensors, (0, 24), (0, 48)) == (description, tensors)
    with pytest.raises(ValueError, match="scales are not of a row"):
        cut(description, tensors, (0, 12), (0, 48))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_neighbours_of_one_format_become_one_layer_with_the_same_product(spec):
    description, tensors, decoded = layer(spec)
    parts = [cut(description, tensors, rows, (0, 48)) for rows in ((0, 5), (5, 13), (13, 24))]
    [(whole, held)] = joined(parts)
    assert {name: (tuple(t.shape), t.dtype) for name, t in held.items()} == whole.layout()
    assert torch.equal(unpack_qtensor(held, whole.spec, whole.shape).dequantize(), decoded)
    one, apart = QuantLinear(whole, held), [QuantLinear(*part) for part in parts]
    for each in (one, *apart):
        each.prepare()
    for tokens in (1, 3, 200):
        x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        found, wanted = one(x), torch.cat([each(x) for each in apart], -1)
        if tokens == 200:  # torch may multiply, and the order of its sums depends on the number of rows
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-5)
        else:
            assert torch.equal(found, wanted)


def test_neighbours_of_two_formats_stay_apart():
    parts = [layer(spec)[:2] for spec in (SPECS[0], SPECS[0], SPECS[1], SPECS[0])]
    found = joined(parts)
    assert [description.shape[0] for description, _ in found] == [48, 24, 24]
    whole = [layer(Spec(Int(4), PerTensor()))[:2]] * 2
    assert joined(whole) == whole
