"""What holds for the Triton kernels wherever they run: on a GPU, or on a CPU in triton's interpreter (TRITON_INTERPRET=1).

Not collected by itself: ``test_triton.py`` runs it in a process of its own, because triton settles at its import whether it
compiles or interprets.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_native import INPUTS, OTHERS, SHAPES, UNIFORM, inputs, sqnr_db, weight
from torch import Tensor

from lowbit import kernels
from lowbit.kernels import PackedLinear, triton
from lowbit.kernels.triton import device, launch
from lowbit.layouts import pack_qtensor
from lowbit.modules import ActSpec, QuantLinear
from lowbit.numerics import (
    NF4,
    Affine,
    BinaryCoded,
    Block,
    Codebook,
    Flat,
    Int,
    KeptColumns,
    Minimum,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Sign,
    SignedScale,
    Sparse,
    Spec,
    fit_params,
    quantize,
)

from helpers import assert_same
from pairwise import cases

DEVICE = "cpu" if device.INTERPRETED else "cuda"
# A layer of each kind, for what is not about grids.
KINDS = [
    Spec(Int(4), PerGroup(64)),
    Spec(Int(3, True), PerChannel()),
    Spec(NF4, PerGroup(64)),
    Spec(Codebook(3), PerChannel()),
    Spec(BinaryCoded(2, offset=True), PerGroup(32)),
]
INTEGERS = [
    act
    for act in INPUTS
    if isinstance(act.grid, Int) and not act.grid.full and not isinstance(act.granularity, PerGroup)
]


def layer(spec: Spec, shape=(40, 129), act: Spec | None = None, act_params: Affine | None = None) -> PackedLinear:
    tensors = {name: t.to(DEVICE) for name, t in pack_qtensor(weight(spec, shape)).items()}
    if act_params is not None:
        act_params = Affine(*(None if t is None else t.to(DEVICE) for t in act_params))
    packed = PackedLinear(spec, shape, tensors, act, act_params)
    assert triton.why_not(packed, 1) is None
    return packed


def run(x: Tensor, packed: PackedLinear) -> Tensor:
    y = triton.run(x.to(DEVICE), packed)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.shape[0])
    return y.cpu()


def reference(x: Tensor, packed: PackedLinear) -> Tensor:
    return kernels.ops.reference(x.to(DEVICE), packed).cpu()


@pytest.mark.parametrize(("i", "spec"), list(enumerate([*UNIFORM, *OTHERS])), ids=str)
def test_a_floating_input_is_multiplied_as_in_float32(i, spec):
    shape = SHAPES[i % len(SHAPES)]  # every group size meets every shape, at some width
    if isinstance(spec.grid, Sign | SignedScale | Minimum):
        packed = PackedLinear(spec, shape, pack_qtensor(weight(spec, shape)), None, None)
        assert "which has no Triton kernel" in (triton.why_not(packed, 1) or "")
        return
    packed, w = layer(spec, shape), weight(spec, shape).dequantize().double()
    x = inputs((1, 5)[i // 3 % 2], shape[1])  # one token has a product of its own, around the same decoded tile
    assert sqnr_db(x.double() @ w.T, run(x, packed)) > 100


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_every_number_of_tokens_is_right_in_every_kind_of_tile(spec):
    shape = (17, 70)
    packed, w = layer(spec, shape), weight(spec, shape).dequantize().double()
    for rows in (0, 1, 2, 16, 17, 33):
        x = inputs(rows, shape[1])
        y = run(x, packed)
        assert rows == 0 or sqnr_db(x.double() @ w.T, y) > 100


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(1, (20, 600), torch.float32), (70, (70, 70), torch.float32), (70, (150, 70), torch.float16)],
    ids=str,
)
def test_many_tiles_in_each_direction_make_one_product(rows, shape, dtype):
    spec = Spec(Int(4), PerGroup(48))
    packed, w, x = layer(spec, shape), weight(spec, shape).dequantize().double(), inputs(rows, shape[1], dtype)
    assert sqnr_db(x.double() @ w.T, run(x, packed)) > (100 if dtype == torch.float32 else 60)


@pytest.mark.parametrize("granularity", [Block(16, 32), Block(7, 5), Flat(20)], ids=str)
@pytest.mark.parametrize("grid", [Int(3), BinaryCoded(2)], ids=str)
def test_parameters_of_blocks_and_of_flat_runs_are_found(grid, granularity):
    spec, shape = Spec(grid, granularity), (40, 100)
    x, w = inputs(3, shape[1]), weight(spec, shape).dequantize().double()
    assert sqnr_db(x.double() @ w.T, run(x, layer(spec, shape))) > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_of_input_give_their_own_type(dtype):
    floor = {torch.bfloat16: 45, torch.float16: 60, torch.float64: 100}[dtype]
    for spec, rows in product(KINDS[::2], (1, 20)):
        packed, w, x = layer(spec), weight(spec, (40, 129)).dequantize().double(), inputs(rows, 129, dtype)
        assert sqnr_db(x.double() @ w.T, run(x, packed)) > floor


def test_inputs_of_any_strides_and_dimensions_are_read_where_they_are():
    packed, w = layer(KINDS[0]), weight(KINDS[0], (40, 129)).dequantize().double()
    for x in (inputs(129, 6).T, inputs(6, 258)[:, ::2], inputs(1, 129).expand(4, -1), inputs(6, 129).view(2, 3, 129)):
        assert sqnr_db(x.double() @ w.T, run(x, packed)) > 100
    act = Spec(Int(8), PerToken())
    packed = layer(Spec(Int(8), PerChannel()), act=act)
    x = inputs(129, 6).T
    assert_same(run(x.contiguous(), packed), run(x, packed))


# Integers


@pytest.mark.parametrize("act", INTEGERS, ids=str)
@pytest.mark.parametrize(
    "spec",
    [Spec(Int(b, s), g) for b, s, g in product((2, 3, 8), (True, False), (PerChannel(), PerTensor()))],
    ids=str,
)
def test_the_integer_product_gives_what_the_reference_gives(spec, act):
    shape = SHAPES[(spec.grid.bits + act.grid.bits) % 2]
    packed = layer(spec, shape, act)
    assert launch._integers(packed)
    x = inputs(5, shape[1])
    assert sqnr_db(reference(x, packed), run(x, packed)) > 90


@pytest.mark.parametrize("act", INPUTS, ids=str)
def test_other_quantized_inputs_are_rounded_first(act):
    for spec in (KINDS[0], KINDS[2]):
        packed, x = layer(spec, act=act), inputs(4, 129)
        assert not launch._integers(packed)
        assert sqnr_db(reference(x, packed), run(x, packed)) > 90


@pytest.mark.parametrize("rows", [1, 2, 20, 70])
def test_the_integer_product_takes_any_number_of_tokens_and_channels(rows):
    packed, x = layer(Spec(Int(8, True), PerChannel()), (150, 70), INTEGERS[1]), inputs(rows, 70, torch.float16)
    assert sqnr_db(reference(x, packed), run(x, packed)) > 60
    assert run(x[:0], packed).shape == (0, 150)


# The interpreter takes its time for each operation on each token, so pairs of factors are covered. Bits and symmetry are one factor, and
# where the range comes from is another: every branch of the kernel hangs on these two, and all of their pairs are here. The dtype is
# only that of the loads, and a kernel that is given a static range does not read the reach.
@pytest.mark.parametrize(
    ("grid", "reach", "dtype"),
    cases(product((2, 4, 8), (True, False)), (1.0, 0.9, "static"), (torch.float32, torch.bfloat16, torch.float16)),
    ids=str,
)
def test_tokens_are_rounded_to_the_very_codes_of_the_specification(grid, reach, dtype):
    (bits, symmetric), static = grid, reach == "static"
    act = Spec(
        Int(bits, symmetric, reach=1.0 if static else reach),
        PerTensor() if static else PerToken(),
        scale_dtype="float32",
    )
    x = inputs(7, 1500)  # more than one block of a token
    x[1] = 0
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4] = torch.arange(1500) % 15 / 2 - 3.5  # ties
    x[5] *= 1e-30
    x[6] *= 1e30 if dtype == torch.bfloat16 else 1e3
    x = x.to(dtype)
    params = fit_params(inputs(64, 50), act, MinMax()) if static else None
    expected, stored = kernels.quantize_activation(x, act, params)
    given = None if params is None else Affine(*(None if t is None else t.to(DEVICE) for t in params))
    codes, scale, zero, total = (t.cpu() for t in launch.quantize(x.to(DEVICE), act, given))
    middle = 2 ** (bits - 1)
    assert_same(codes, (expected.int() - middle).to(torch.int8))
    assert_same(scale, stored.scale[:, 0].expand(7).contiguous())
    assert_same(total, codes.int().sum(1, dtype=torch.int32))
    if stored.zero is not None:
        assert_same(zero, (stored.zero[:, 0].int() - middle).expand(7).contiguous())


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_clip_as_the_reference_does(symmetric):
    act = Spec(Int(8, symmetric), PerTensor(), scale_dtype="float32")
    packed = layer(Spec(Int(8), PerChannel()), act=act, act_params=fit_params(inputs(64, 129), act, MinMax()))
    x = 2 * inputs(9, 129)
    assert sqnr_db(reference(x, packed), run(x, packed)) > 90


def test_the_integer_product_does_not_overflow_at_its_widest():
    spec, shape = Spec(Int(8), PerChannel(), scale_dtype="float32"), (2, 33025)  # 2**31 // 255**2
    w = torch.full(shape, 1.0)
    w[:, 0] = 0
    tensors = {name: t.to(DEVICE) for name, t in pack_qtensor(quantize(w, spec, MinMax())).items()}
    packed = PackedLinear(spec, shape, tensors, Spec(Int(8), PerToken()))
    x = torch.full((1, shape[1]), 3.0)
    assert launch._integers(packed) and sqnr_db(reference(x, packed), run(x, packed)) > 90
    wider = replace(packed, shape=(2, shape[1] + 1))
    assert not launch._integers(wider)


# What is not a number


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says of infinity times zero what it is
@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("act", [None, *INTEGERS[:2]], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_output_of_their_token_only(bad, act, rows):
    for spec in (*KINDS[::2], KINDS[1]) if act is None else (KINDS[0], Spec(Int(8), PerChannel())):
        x = inputs(rows, 129)
        x[rows // 2, 7] = bad
        y = run(x, layer(spec, act=act))
        assert not torch.isfinite(y[rows // 2]).any()
        assert rows == 1 or torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("static", [False, True])
def test_nan_within_one_range_for_all_tokens_is_the_references(static):
    act = Spec(Int(8, True), PerTensor(), scale_dtype="float32")
    params = fit_params(inputs(64, 129), act, MinMax()) if static else None
    packed = layer(Spec(Int(8), PerChannel()), act=act, act_params=params)
    for bad in (torch.nan, torch.inf):
        x = inputs(3, 129)
        x[1, 7] = bad
        assert run(x, packed).isnan().tolist() == reference(x, packed).isnan().tolist()


def test_zeros_give_zeros():
    for spec, act in product((KINDS[0], Spec(Int(8), PerChannel())), (None, INTEGERS[1])):
        assert not run(torch.zeros(2, 129), layer(spec, act=act)).any()


# The rest of a layer


@pytest.mark.parametrize("act", [None, INTEGERS[0]], ids=str)
def test_side_terms_are_added(act):
    extra = torch.randn(40, 129, generator=torch.Generator().manual_seed(5))
    side = (
        KeptColumns.of(extra[:, :3].to(DEVICE), torch.tensor([2, 70, 128], device=DEVICE)),
        Sparse.of(extra.to(DEVICE), (extra > 2).to(DEVICE)),
    )
    packed = replace(layer(Spec(Int(8), PerChannel()), act=act), side_terms=side)
    x = inputs(4, 129)
    assert sqnr_db(reference(x, packed), run(x, packed)) > 90


@pytest.mark.parametrize("act", [None, INTEGERS[0]], ids=str)
def test_gradients_are_the_references(act):
    packed, grads = layer(Spec(Int(8), PerChannel()), act=act), []
    for each in (triton.run, kernels.ops.reference):
        x = inputs(2, 129).to(DEVICE).requires_grad_()
        each(x, packed).square().sum().backward()
        grads.append(x.grad)
    assert grads[0].any() and torch.equal(*grads)


def test_a_layer_runs_by_it_and_explain_says_so(monkeypatch):
    act = ActSpec(Spec(Int(8), PerToken()))
    plain = QuantLinear.from_qtensor(weight(Spec(Int(8), PerChannel()), (40, 129)), torch.randn(40), act).to(DEVICE)
    assert [reason.kernel for reason in plain.explain(3) if reason.why_not is None] == ["triton"]
    x = inputs(3, 129).to(DEVICE)
    found = plain(x)
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    assert sqnr_db(plain(x), found) > 90
