"""What is read of a packed linear is compared with the layer's own shape before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.modules import LinearDescription, QuantLinear
from lowbit.modules.activation import ActSpec
from lowbit.numerics import (
    NF4,
    Affine,
    Codebook,
    Float,
    Int,
    KeptColumns,
    KMeans,
    LowRank,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    Sparse,
    Spec,
    Table,
    quantize,
)
from lowbit.transforms import Normalize, Permute, RandomHadamard, Reassembly, Rotate, Scale, Shift, Split

O, I = 32, 64
NAN, INF = float("nan"), float("inf")


def weight(columns: int = I) -> Tensor:
    return torch.randn(O, columns, generator=torch.Generator().manual_seed(0))


def packed(spec: Spec | None = None, columns: int = I, **around) -> QuantLinear:
    spec = spec or Spec(Int(4), PerGroup(16))
    fit = KMeans() if isinstance(spec.grid, Codebook) else MinMax()
    return QuantLinear.from_qtensor(quantize(weight(columns), spec, fit), **around)


def described(change, **around) -> LinearDescription:
    data = packed(**around).description.to_json()
    change(data)
    return LinearDescription.from_json(json.loads(json.dumps(data)))


def tensor(*shape: int, dtype: str = "float32") -> dict:
    return {"shape": list(shape), "dtype": dtype}


SPARSE = Sparse.of(weight(), weight().abs() > 1.5)
KEPT = KeptColumns.of(weight()[:, :3], torch.tensor([9, 2, 30]))
LOW = LowRank.of(torch.ones(4, I), torch.ones(O, 4))
MERGED = Reassembly(I, *(torch.tensor(each, dtype=torch.int16) for each in ([1, 5], [2, 5], [7, 9])))


@pytest.mark.parametrize(
    ("place", "part", "field", "value", "said"),
    [
        ("pre", Permute(torch.arange(I)), "index", tensor(16, dtype="int32"), r"pre0_index of a Permute .* \[16\]"),
        ("pre", Permute(torch.arange(I)), "index", tensor(I, 1, dtype="int32"), r"\[64, 1\], expected integer \[64\]"),
        ("pre", Permute(torch.arange(I)), "index", tensor(I), "float32"),
        ("pre", Scale(torch.ones(I)), "s", tensor(8), "pre0_s of a Scale"),
        ("pre", Shift(torch.ones(I)), "d", tensor(1), "pre0_d of a Shift"),
        ("pre", Rotate(torch.eye(8)), "q", tensor(8, 3), "pre0_q of a Rotate"),
        ("pre", Rotate(torch.eye(8)), "q", tensor(7, 8, 8), "pre0_q of a Rotate"),
        ("pre", RandomHadamard(1, I), "size", 10**12, "a divisor of 64"),
        ("pre", RandomHadamard(1, I), "size", 24, "a divisor of 64"),
        ("pre", RandomHadamard(1, I), "size", True, "expected int"),
        ("pre", RandomHadamard(1, I), "inverted", 1, "expected bool"),
        ("pre", RandomHadamard(1, I), "seed", tensor(2, dtype="int64"), "pre0_seed"),
        ("pre", MERGED, "size", 10**9, "expected 64"),
        ("pre", MERGED, "into", tensor(3, dtype="int16"), "pre0_into of a Reassembly"),
        ("post", Scale(torch.ones(O)), "s", tensor(I), "post0_s of a Scale"),
        ("post", RandomHadamard(1, O), "size", I, "a divisor of 32"),
        ("post", Normalize(), "eps", 1, "post0_eps of a Normalize is 1, expected float"),
        ("post", Normalize(), "eps", 0.0, "post0_eps of a Normalize is 0.0, expected a positive number"),
        ("post", Normalize(), "eps", float("inf"), "expected a positive number"),
        ("side_terms", SPARSE, "row_start", tensor(O + 1, 1, dtype="int32"), "side0_row_start of a Sparse"),
        ("side_terms", SPARSE, "column", tensor(3, dtype="int16"), "side0_column of a Sparse"),
        ("side_terms", KEPT, "index", tensor(3, 1, dtype="int32"), "side0_index of a KeptColumns"),
        ("side_terms", KEPT, "value", tensor(O - 1, 3, dtype="float16"), "side0_value of a KeptColumns"),
        ("side_terms", LOW, "a", tensor(4, 1, dtype="float16"), "side0_a of a LowRank"),
        ("side_terms", LOW, "b", tensor(O, 5, dtype="float16"), "side0_b of a LowRank"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_part_of_another_shape_than_its_layer_is_refused_by_its_field(place, part, field, value, said):
    entry = "side" if place == "side_terms" else place
    with pytest.raises(ValueError, match=said):
        described(lambda data: data[entry][0].update({field: value}), **{place: (part,)})


def test_transforms_in_a_row_are_compared_with_the_width_between_them():
    counts = torch.ones(I - 4, dtype=torch.int32)
    counts[:4] = 2
    around: dict[str, Any] = {"pre": (Scale(torch.ones(I - 4)), Split(counts), Shift(torch.zeros(I)))}
    assert described(lambda data: None, **around).features == (I - 4, O)
    with pytest.raises(ValueError, match=r"pre0_s of a Scale is torch.float32 \[64\], expected floating \[60\]"):
        described(lambda data: data["pre"][0].update(s=tensor(I)), **around)
    layer = packed(**around)
    layer._buffers["pre1_counts"] = counts + 1  # pyright: ignore[reportOptionalOperand]
    with pytest.raises(ValueError, match="pre1_counts makes 124 channels, expected 64"):
        layer.prepare()


def first(value: float):
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return change


STATIC = ActSpec(Spec(Int(8), PerTensor()), static=True)
STATIC_PARAMS = Affine(torch.tensor([[0.1]]), torch.tensor([[7.0]]))
TWICE = Spec(Int(4), PerGroup(16), stats=Spec(Int(4), PerGroup(16)))


@pytest.mark.parametrize(
    ("layer", "name", "change", "said"),
    [
        (lambda: packed(), "scale", first(NAN), "scale holds NaN or Inf"),
        (lambda: packed(), "scale", first(0), "scale holds 0, expected scales above zero"),
        (lambda: packed(), "scale", torch.neg, "expected scales above zero"),
        (lambda: packed(Spec(Codebook(3), PerChannel())), "values", first(INF), "values holds NaN or Inf"),
        (lambda: packed(Spec(NF4, PerGroup(16))), "scale", first(-INF), "scale holds NaN or Inf"),
        (lambda: packed(TWICE), "scale_scale", first(NAN), "scale_scale holds NaN"),
        (lambda: packed(TWICE), "scale_scale", first(0), "scale_scale holds 0"),
        (
            lambda: packed(Spec(Int(4), PerGroup(16), scale_dtype="float8_e8m0fnu")),
            "scale",
            lambda t: torch.full_like(t.view(torch.uint8), 255).view(t.dtype),
            "scale holds NaN",
        ),
        (
            lambda: packed(Spec(Table((-1.0, 0.0, 1.0)), PerChannel())),
            "codes",
            lambda t: torch.full_like(t, 255),
            "codes holds code 3 of a table of 3 values",
        ),
        (lambda: packed(bias=torch.zeros(O)), "bias", first(NAN), "bias holds NaN"),
        (lambda: packed(act=STATIC, act_params=STATIC_PARAMS), "act_scale", first(0), "act_scale holds 0"),
        (lambda: packed(act=STATIC, act_params=STATIC_PARAMS), "act_zero", first(0.5), "act_zero holds a zero point"),
        (lambda: packed(act=STATIC, act_params=STATIC_PARAMS), "act_zero", first(256), "act_zero holds a zero point"),
        (lambda: packed(pre=(Scale(torch.ones(I)),)), "pre0_s", first(0), "pre0_s holds zero"),
        (lambda: packed(pre=(Shift(torch.ones(I)),)), "pre0_d", first(INF), "pre0_d holds NaN or Inf"),
        (lambda: packed(pre=(Permute(torch.arange(I)),)), "pre0_index", first(64), "pre0_index is no order"),
        (lambda: packed(pre=(Permute(torch.arange(I)),)), "pre0_index", first(1), "pre0_index is no order"),
        (lambda: packed(pre=(Rotate(torch.eye(8)),)), "pre0_q", first(3), "pre0_q is no rotation"),
        (lambda: packed(pre=(RandomHadamard(1, I),)), "pre0_seed", torch.neg, "pre0_seed is -1"),
        (lambda: packed(pre=(MERGED,)), "pre0_slot", first(64), "pre0_slot names channels 5 to 64"),
        (lambda: packed(pre=(MERGED,)), "pre0_slot", first(5), "pre0_slot names a channel twice"),
        (lambda: packed(pre=(MERGED,)), "pre0_copied", first(1), "two roles"),
        (lambda: packed(side_terms=(SPARSE,)), "side0_row_start", first(1), "side0_row_start does not count"),
        (lambda: packed(side_terms=(SPARSE,)), "side0_column", first(64), "side0_column names channels"),
        (lambda: packed(side_terms=(SPARSE,)), "side0_column", torch.zeros_like, "does not rise within its rows"),
        (lambda: packed(side_terms=(SPARSE,)), "side0_value", first(NAN), "side0_value holds NaN"),
        (lambda: packed(side_terms=(KEPT,)), "side0_index", first(-1), "side0_index names channels -1 to"),
        (lambda: packed(side_terms=(KEPT,)), "side0_index", first(9), "side0_index does not rise"),
        (lambda: packed(side_terms=(LOW,)), "side0_a", first(INF), "side0_a holds NaN"),
    ],
)
def test_values_that_no_layer_has_are_refused_by_the_name_of_their_tensor(layer, name, change, said):
    made = layer()
    made.prepare()  # as it was
    made = layer()
    made._buffers[name] = change(made._buffers[name])
    with pytest.raises(ValueError, match=said):
        made.prepare()


def test_sizes_that_ask_for_all_memory_are_refused_or_cost_nothing():
    with pytest.raises(ValueError, match="two sizes of 1 to"):
        described(lambda data: data.update(shape=[O, 10**12]))
    with pytest.raises(ValueError, match="at most 3 times"):
        spec = Spec(Int(4), PerChannel())
        for _ in range(5):
            spec = Spec(Int(4), PerChannel(), stats=spec)
    with pytest.raises(ValueError, match="numbers of float32"):
        Table((0.0, NAN))
    huge = packed(Spec(Int(4), PerGroup(10**12)))
    assert torch.equal(huge.dequantize(), packed(Spec(Int(4), PerGroup(I))).dequantize())


def test_what_changes_after_loading_is_checked_and_prepared_anew():
    x = torch.randn(3, I)
    layer = packed(side_terms=(SPARSE,))
    layer.prepare()
    before = layer(x)
    layer.scale.mul_(2)  # pyright: ignore[reportCallIssue]
    assert not torch.equal(layer(x), before)
    layer.scale.mul_(0.5)  # pyright: ignore[reportCallIssue]
    assert torch.equal(layer(x), before)
    layer.side0_column.fill_(2**14)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="side0_column names channels 16384"):
        layer(x)
    with torch.inference_mode():  # whose tensors do not count their changes
        layer = packed(side_terms=(SPARSE,))
        layer.prepare()
        layer.side0_column.fill_(2**14)  # pyright: ignore[reportCallIssue]
        with pytest.raises(ValueError, match="side0_column names channels 16384"):
            layer(x)


ANY_LAYER = {
    "group": lambda: packed(),
    "static": lambda: packed(act=STATIC, act_params=STATIC_PARAMS),
    "dynamic": lambda: packed(act=ActSpec(Spec(Int(8), PerTensor()))),
    "floating input": lambda: packed(act=ActSpec(Spec(Float(2, 1), PerGroup(16)))),
    "threshold": lambda: packed(act=ActSpec(Spec(Int(8), PerTensor()), threshold=1.0)),
    "rotated": lambda: packed(pre=(RandomHadamard(1, I),), side_terms=(SPARSE, KEPT, LOW)),
}


@pytest.mark.parametrize("kind", ANY_LAYER)
@pytest.mark.parametrize("kernels", ["", "reference"])
def test_one_vector_and_no_token_run_as_rows_do(kind, kernels, monkeypatch):
    monkeypatch.setenv("LOWBIT_KERNELS", kernels)
    layer = ANY_LAYER[kind]()
    layer.prepare()
    x = torch.randn(I)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    assert layer(torch.zeros(0, I)).shape == (0, O) and layer(torch.zeros(2, 0, I)).shape == (2, 0, O)
    with pytest.raises(ValueError, match="reads 64 channels"):
        layer(torch.tensor(1.0))


def test_a_static_range_clips_infinity_and_keeps_nan_in_every_kernel(monkeypatch):
    layer = packed(act=STATIC, act_params=STATIC_PARAMS)
    layer.prepare()
    x = torch.randn(4, I)
    x[0, 3], x[1, 5], x[2, 7] = INF, -INF, NAN
    found = layer(x)
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    torch.testing.assert_close(found, layer(x), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(found[[0, 1, 3]]).all() and found[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_a_spike_in_a_channel_of_weight_zero_takes_nothing_from_the_others(tokens, dtype, monkeypatch):
    w = weight(96)
    w[:, 3] = 0
    layer = QuantLinear.from_qtensor(quantize(w, Spec(Int(4), PerGroup(32)), MinMax()))
    layer.prepare()
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 3] = 1e6
    wanted = x.double() @ layer.dequantize().double().T
    error = (layer(x).double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
