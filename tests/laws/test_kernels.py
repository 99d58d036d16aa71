"""The law of kernels: what any kernel computes is what the reference computes, up to float rounding."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowbit import kernels
from lowbit.kernels import Kernel, PackedLinear, decode_packed, instructions, int8_torch
from lowbit.layouts import pack_qtensor
from lowbit.numerics import (
    NF4,
    Float,
    Int,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Spec,
    fit_params,
    quantize,
)

from pairwise import cases

SHAPES = [(1, 1), (1, 7), (5, 3), (8, 8), (17, 33), (64, 48), (40, 129)]
ROWS = [1, 2, 7, 17]
WEIGHTS = [Spec(Int(b, s), g) for b, s, g in product((2, 4, 7, 8), (True, False), (PerChannel(), PerTensor()))]
INPUTS = [Spec(Int(b, s), g) for b, s, g in product((4, 8), (True, False), (PerToken(), PerTensor()))]
INPUTS += [Spec(Int(4, symmetric=True, reach=0.9), PerToken())]


def traits(spec: Spec) -> tuple:
    """What one of these formats consists of."""
    return spec.grid.bits, spec.grid.symmetric, spec.grid.reach, spec.granularity


def layer(spec: Spec, shape=(24, 50), act: Spec | None = None, act_params=None) -> PackedLinear:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    return PackedLinear(spec, shape, pack_qtensor(quantize(w, spec, MinMax())), act, act_params)


def inputs(rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)) + 0.3


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.double().pow(2).sum() / (x.double() - y.double()).pow(2).sum()))


def kernel(name: str) -> Kernel:
    return next(k for k in (*kernels.ops._KERNELS, kernels.ops._REFERENCE) if k.name == name)


def check_kernel(name: str, layer: PackedLinear, x: torch.Tensor, floor_db: float) -> None:
    """Any kernel can be run through this: it agrees with the reference to ``floor_db``."""
    assert kernel(name).why_not(layer, len(x)) is None
    expected = kernel("reference").run(x, layer)
    found = kernel(name).run(x, layer)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected) or sqnr_db(expected, found) > floor_db


@pytest.mark.parametrize(
    ("act", "weight"),
    cases(INPUTS, WEIGHTS, traits=lambda act, weight: (*traits(act), *traits(weight))),
    ids=str,
)
def test_the_integer_product_agrees_with_the_reference(weight, act):
    for shape in SHAPES:
        packed = layer(weight, shape, act)
        for rows in ROWS:
            check_kernel("int8_torch", packed, inputs(rows, shape[1]), 90)


@pytest.mark.parametrize("channels", [1, 50, 1024, 2500])
def test_an_integer_product_is_the_same_whole_numbers_with_and_without_instructions_for_it(channels, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, channels), dtype=torch.int8, generator=generator) for n in (20, 7))
    a[0], b[0] = -128, -128  # the largest sum there is
    wanted = (a.long() @ b.long().T).to(torch.int32)
    for has in (True, False):
        monkeypatch.setattr(int8_torch, "faster_than_float32", lambda dtype, has=has: has)
        assert torch.equal(int8_torch._product(a, b), wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integer_product_takes_static_ranges(symmetric):
    act = Spec(Int(8, symmetric), PerTensor(), scale_dtype="float32")
    params = fit_params(inputs(64, 50), act, MinMax())
    check_kernel("int8_torch", layer(Spec(Int(8), PerChannel()), act=act, act_params=params), 2 * inputs(9, 50), 90)


def test_the_integer_product_does_not_overflow_at_its_widest():
    act = Spec(Int(8, symmetric=False), PerToken())
    shape = (2, 33025)  # 2**31 // 255**2
    spec = Spec(Int(8), PerChannel(), scale_dtype="float32")
    w = torch.full(shape, 1.0)
    w[:, 0] = 0
    packed = PackedLinear(spec, shape, pack_qtensor(quantize(w, spec, MinMax())), act)
    check_kernel("int8_torch", packed, torch.full((1, shape[1]), 3.0), 90)


@pytest.mark.parametrize(
    ("spec", "act", "reason"),
    [
        (Spec(Int(8), PerChannel()), None, "the input is not quantized"),
        (Spec(Int(8), PerGroup(10)), Spec(Int(8), PerToken()), "one scale for each output channel"),
        (Spec(Int(8), PerChannel()), Spec(Int(8), PerGroup(10)), "one scale for each token"),
        (Spec(NF4, PerChannel()), Spec(Int(8), PerToken()), "weights are Table of 4 bits"),
        (Spec(Int(8), PerChannel()), Spec(Float(4, 3), PerToken()), "activations are Float of 8 bits"),
        (Spec(Int(8, zero="real"), PerChannel()), Spec(Int(8), PerToken()), "integer zero points"),
        (Spec(Int(1, True), PerChannel()), Spec(Int(8), PerToken()), "integers of 2 to 8 bits"),
    ],
)
def test_every_layer_the_integer_product_cannot_run_has_a_reason_and_runs_by_the_reference(spec, act, reason):
    packed = layer(spec, act=act)
    *compiled, on_gpu, first, last = kernels.explain(packed, 4)
    assert all("not packed for it" in found.why_not for found in compiled)
    assert on_gpu.kernel == "triton" and "the layer is on cpu" in on_gpu.why_not
    assert first.kernel == "int8_torch" and first.why_not and reason in first.why_not
    assert last.kernel == "reference" and last.why_not is None
    assert kernels.choose(packed, 4).name == "reference"


def test_the_environment_forces_one_kernel_and_refuses_unknown_or_unfit_ones(monkeypatch):
    fit, unfit = layer(Spec(Int(8), PerChannel()), act=Spec(Int(8), PerToken())), layer(Spec(Int(8), PerChannel()))
    assert kernels.choose(fit, 4).name == "int8_torch"
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    assert kernels.choose(fit, 4).name == "reference"
    assert [r.why_not for r in kernels.explain(fit, 4) if r.kernel == "int8_torch"] == [
        "LOWBIT_KERNELS=reference is set"
    ]
    monkeypatch.setenv("LOWBIT_KERNELS", "int8_torch")
    with pytest.raises(ValueError, match="cannot run this layer: the input is not quantized"):
        kernels.choose(unfit, 4)
    monkeypatch.setenv("LOWBIT_KERNELS", "referense")
    with pytest.raises(ValueError, match=r"'referense' is not a kernel \(did you mean 'reference'"):
        kernels.choose(fit, 4)


def test_a_registered_kernel_is_asked_first(monkeypatch):
    monkeypatch.setattr(kernels.ops, "_KERNELS", list(kernels.ops._KERNELS))
    kernels.register(Kernel("zeros", lambda l, rows: None if rows == 1 else "one row only", lambda x, l: x[..., :0]))
    packed = layer(Spec(Int(4), PerGroup(10)))
    assert kernels.run(inputs(1, 50), packed).shape == (1, 0)
    assert kernels.run(inputs(2, 50), packed).shape == (2, 24)
    assert kernels.explain(packed, 2)[0].why_not == "one row only"


@pytest.mark.parametrize("name", ["reference", "int8_torch"])
@pytest.mark.parametrize("static", [False, True])
def test_nan_in_the_input_reaches_the_output_of_its_token_only(name, static):
    act = Spec(Int(8, True), PerTensor() if static else PerToken(), scale_dtype="float32")
    params = fit_params(inputs(64, 50), act, MinMax()) if static else None
    x = inputs(3, 50)
    x[1, 7] = torch.nan
    y = kernel(name).run(x, layer(Spec(Int(8), PerChannel()), act=act, act_params=params))
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    "spec",
    [
        Spec(Int(4), PerGroup(16)),
        Spec(Int(3, True), PerChannel()),
        Spec(Int(1, True), PerGroup(16)),
        Spec(Int(5, zero="real"), PerGroup(7)),
        Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(256), scale_dtype="float32")),
        Spec(Float(3, 2), PerTensor()),
    ],
    ids=str,
)
def test_the_quick_decoding_gives_the_bits_of_dequantize(spec):
    q = quantize(torch.randn(20, 75, generator=torch.Generator().manual_seed(3)), spec, MinMax())
    assert torch.equal(decode_packed(pack_qtensor(q), spec, q.shape), q.dequantize())


def test_what_is_faster_does_not_depend_on_the_context_it_is_asked_in(monkeypatch):
    """Under autocast, or another default type, a product that was to be in float32 would be timed in something else."""
    seen, times = [], torch.mm

    def mm(a, b):
        seen.append(torch.is_autocast_enabled("cpu"))
        return times(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    instructions.speedup.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert instructions.speedup(torch.bfloat16) > 0
    assert seen and not any(seen)


def test_the_integer_product_is_traced_whole():
    instructions.speedup.cache_clear()  # as where nobody has asked before
    a, b = (torch.randint(-128, 128, (rows, 64), dtype=torch.int8) for rows in (20, 32))
    traced = torch.compile(int8_torch._product, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(a, b), int8_torch._product(a, b))


def test_the_clock_of_types_runs_on_one_thread_and_gives_the_others_back(monkeypatch):
    seen, before, multiply = set(), torch.get_num_threads(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *factors: seen.add(torch.get_num_threads()) or multiply(*factors))
    torch.set_num_threads(2)
    try:
        assert instructions.speedup.__wrapped__(torch.bfloat16) > 0
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
