"""A draft that is simulated gives, bit for bit, what the packed layer's reference gives, whatever was decided of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit.architectures import ResolvedBlock, ResolvedInput
from lowbit.modules import ActSpec, DraftLinear, LinearFormat, QuantLinear, make_drafts, static_params, unmake_drafts
from lowbit.numerics import (
    NF4,
    Affine,
    BinaryCoded,
    Block,
    Clipped,
    Codebook,
    Fixed,
    Flat,
    Float,
    Int,
    KeptColumns,
    LowRank,
    Normal,
    OutlierVictim,
    PerChannel,
    PerCluster,
    PerGroup,
    PerInput,
    PerTensor,
    PerToken,
    Sign,
    Sparse,
    Spec,
    fit_raw,
    powers_of_two,
    usual_fit,
)
from lowbit.numerics.fit import MinMax
from lowbit.solve import Nearest
from lowbit.steps import BlockState, Solve
from lowbit.transforms import Kronecker, Normalize, Permute, RandomHadamard, Reassembly, Rotate, Scale, Shift, Split

from helpers import assert_same, sqnr_db
from pairwise import cases

O, I = 24, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


E4M3_OF_TENSOR = Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32")
HALVED = Spec(powers_of_two(3), PerTensor(), scale_dtype="float32")
WEIGHTS = {
    "symmetric groups": Spec(Int(4, symmetric=True), PerGroup(16)),
    "asymmetric groups": Spec(Int(3), PerGroup(16), scale_dtype="bfloat16"),
    "symmetric channels": Spec(Int(8, symmetric=True, full=True), PerChannel()),
    "asymmetric channels": Spec(Int(4), PerChannel()),
    "real zero points": Spec(Int(4, zero="real"), PerGroup(16)),
    "one bit": Spec(Int(1, symmetric=True), PerChannel()),
    "a tensor": Spec(Int(8), PerTensor(), scale_dtype="float32"),
    "blocks": Spec(Int(4), Block(8, 16)),
    "floats": Spec(Float(2, 1), PerGroup(16)),
    "shared exponents": Spec(Float(2, 1, shared_exponent=True), PerGroup(8), scale_dtype="float8_e8m0fnu"),
    "scales of 8 bits": Spec(Float(2, 1), PerGroup(8), E4M3_OF_TENSOR, "float32"),
    "quantized scales and zero points": Spec(Int(3, zero="real"), PerGroup(8), Spec(Int(3, zero="real"), PerGroup(8))),
    "centred scales": Spec(NF4, Flat(8), Spec(Int(8, zero="real"), Flat(256)), "float32", stats_centred=True),
    "normal levels": Spec(Normal(3), PerGroup(16)),
    "tables": Spec(Codebook(3), PerChannel()),
    "binary codes": Spec(BinaryCoded(3), PerGroup(16)),
    "pairs": Spec(OutlierVictim(4), PerChannel()),
    "signs": Spec(Sign(), PerTensor()),
}
ACTS = {
    "none": None,
    "tokens": ActSpec(Spec(Int(8), PerToken())),
    "groups": ActSpec(Spec(Int(4), PerGroup(16))),
    "floats": ActSpec(Spec(Float(4, 3), PerToken())),
    "scales of 8 bits": ActSpec(Spec(Float(2, 1), PerGroup(8), E4M3_OF_TENSOR, "float32")),
    "threshold": ActSpec(Spec(Int(8), PerToken()), threshold=2.5),
    "static": ActSpec(Spec(Int(8), PerTensor()), static=True),
    "static clusters": ActSpec(Spec(Int(6), PerCluster((10, 25, 5))), static=True),
    "static channels": ActSpec(Spec(Float(4, 3), PerInput(), HALVED, "float32"), static=True),
    "static pairs": ActSpec(Spec(OutlierVictim(8), PerTensor()), static=True),
}
TRANSFORMS = {
    "nothing": (),
    "scale": ((Scale(random(I).abs() + 0.5), None),),
    "half scale": ((Scale((random(I).abs() + 0.5).half()), None),),
    "shift, then order": ((Shift(random(I)), None), (Permute(torch.arange(I).flip(0)), None)),
    "rotations": ((RandomHadamard(3, I), RandomHadamard(4, O)),),
    "scale, then rotations": ((Scale(random(I).abs() + 0.5), None), (Kronecker(3, I), Kronecker(4, O))),
    "matrix": ((Rotate.random_orthogonal(I, 0, dtype=torch.float32), None),),
    "reassembly": ((Reassembly(I, *(torch.tensor([k], dtype=torch.int16) for k in (1, 2, 3))), None),),
}
SIDES = {
    "nothing": (),
    "low rank": (LowRank.of(random(2, I) / 9, random(O, 2, seed=1) / 9),),
    "sparse and kept": (
        Sparse.of(random(O, I, seed=2), random(O, I, seed=3) > 2),
        KeptColumns.of(random(O, 2, seed=4), torch.tensor([7, 3])),
    ),
}


def linear_of(kind: type[nn.Module] = nn.Linear, bias: bool = True) -> nn.Module:
    linear = Conv1D(O, I) if kind is Conv1D else nn.Linear(I, O, bias=bias)
    weight = random(O, I, seed=5)
    weight[:, 3] *= 4
    with torch.no_grad():
        linear.get_parameter("weight").copy_(weight.T if kind is Conv1D else weight)
        if bias:
            linear.get_parameter("bias").copy_(random(O, seed=6))
    return linear.requires_grad_(False)


class Alone(nn.Module):
    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear


def state_of(linear: nn.Module, form: LinearFormat) -> BlockState:
    resolved = ResolvedBlock({"linear": "linear"}, (ResolvedInput("input", ("linear",)),), (("linear",),), (), {})
    return BlockState.of("", Alone(linear), resolved, {"linear": form})


def x_of() -> Tensor:
    x = random(3, 7, I, seed=8)
    x[..., 5] *= 6
    return x


def inputs_of(draft: DraftLinear, x: Tensor) -> Tensor:
    """What the draft's weight reads, ``[tokens, I]``."""
    seen: list[Tensor] = []
    with draft.observed(seen.append):
        draft(x)
    return seen[0].flatten(0, -2)


def decided(
    form: LinearFormat,
    kind: type[nn.Module] = nn.Linear,
    bias: bool = True,
    transforms: str = "nothing",
    side: str = "nothing",
) -> BlockState:
    """A state whose one draft was transformed, has side terms, and knows its static range."""
    state = state_of(linear_of(kind, bias), form)
    for of_input, of_output in TRANSFORMS[transforms]:
        if isinstance(of_input, Shift) and not bias:
            state.draft("linear").bias = nn.Parameter(torch.zeros(O), requires_grad=False)
        state.transform("linear", of_input, of_output)
    draft = state.draft("linear")
    draft.side_terms = SIDES[side]
    if form.act is not None and form.act.static:
        bounds = torch.stack(inputs_of(draft, x_of()).aminmax(dim=0))
        draft.act_params = static_params(form.act, 0.9 * bounds)
    return state


def simulated(draft: DraftLinear, x: Tensor, *trial: Any, **chosen: Any) -> Tensor:
    with torch.no_grad(), draft.simulated(*trial, **chosen):
        return draft(x)


def packed(state: BlockState) -> QuantLinear:
    form = state.formats["linear"]
    Solve(Nearest(usual_fit(form.weight.grid))).run(state)
    layer = state.block.get_submodule("linear")
    assert isinstance(layer, QuantLinear)
    return layer


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")


def _cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Every weight format with every input format; what is around them goes round, so that all of it meets all kinds of both."""
    around = [
        {"transforms": transforms, "side": side, "bias": bias, "kind": kind}
        for transforms in TRANSFORMS
        for side in SIDES
        for bias, kind in ((True, nn.Linear), (False, nn.Linear), (True, Conv1D))
    ]
    return [(w, a, around[(7 * i + 5 * j) % len(around)]) for i, w in enumerate(WEIGHTS) for j, a in enumerate(ACTS)]


@pytest.mark.parametrize(("weight", "act", "around"), _cases())
def test_a_simulated_draft_computes_what_its_packed_layer_will(weight: str, act: str, around: dict[str, Any]) -> None:
    state, x = decided(LinearFormat(WEIGHTS[weight], ACTS[act]), **around), x_of()
    found = simulated(state.draft("linear"), x)
    assert_same(found, packed(state)(x))


@pytest.mark.parametrize(
    ("transforms", "side", "made", "act"),
    cases(TRANSFORMS, SIDES, [(True, nn.Linear), (False, nn.Linear), (True, Conv1D)], ["none", "tokens"]),
)
def test_so_it_does_with_everything_around_its_product(
    transforms: str, side: str, made: tuple[bool, type[nn.Module]], act: str
) -> None:
    bias, kind = made
    form, x = LinearFormat(WEIGHTS["asymmetric channels"], ACTS[act]), x_of()
    state = decided(form, kind, bias, transforms, side)
    found = simulated(state.draft("linear"), x)
    assert_same(found, packed(state)(x))


@pytest.mark.parametrize("weight", ["signs", "asymmetric groups"])
@pytest.mark.parametrize("act", ["none", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_so_it_does_where_inputs_and_outputs_are_scaled_and_outputs_normalized(
    weight: str, act: str, bias: bool
) -> None:
    state, x = state_of(linear_of(bias=bias), LinearFormat(WEIGHTS[weight], ACTS[act])), x_of()
    draft = state.draft("linear")
    draft.pre = (Scale((random(I).abs() + 0.5).half()),)
    draft.post = (Scale((random(O, seed=1).abs() + 0.5).half()), Normalize())
    found = simulated(draft, x)
    whole = found if draft.bias is None else found - draft.bias
    torch.testing.assert_close(whole.mean(-1), torch.zeros(3, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.var(-1, correction=0), torch.ones(3, 7), rtol=1e-2, atol=0)
    assert_same(found, packed(state)(x))


@pytest.mark.parametrize(
    "weight", [name for name, spec in WEIGHTS.items() if spec.grid not in (BinaryCoded(3), Sign())]
)
def test_ranges_and_offsets_that_were_chosen_count(weight: str) -> None:
    spec, x = WEIGHTS[weight], x_of()
    state = decided(LinearFormat(spec))
    draft, plain = state.draft("linear"), simulated(state.draft("linear"), x)
    raw = fit_raw(draft.weight, spec, usual_fit(spec.grid))
    granules = len(raw[0])  # pyright: ignore[reportArgumentType]
    share = torch.linspace(0.6, 1, granules)[:, None]
    if isinstance(spec.grid, Codebook):
        draft.range_shares = Fixed(raw._make(0.9 * p for p in raw))  # pyright: ignore[reportArgumentType]
    else:
        draft.range_shares = Clipped(share, share.flip(0))
    draft.rounding_offset = 0.05 * random(O, I, seed=9)
    found = simulated(draft, x)
    assert not torch.equal(found, plain)
    assert_same(found, packed(state)(x))


@pytest.mark.parametrize(
    "transform", [Scale(random(I).abs() + 0.5), RandomHadamard(3, I), Split(torch.tensor([3] + [1] * (I - 1)))]
)
@pytest.mark.parametrize("act", ["none", "tokens", "static"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_transform_that_is_tried_gives_what_it_gives_once_it_is_applied(transform, act: str, kind) -> None:
    x, form = x_of(), LinearFormat(WEIGHTS["symmetric groups"], ACTS[act])
    tried, applied = (state_of(linear_of(kind), form) for _ in range(2))
    bounds = torch.stack(inputs_of(tried.draft("linear"), x).aminmax(dim=0))
    found = simulated(tried.draft("linear"), x, transform, bounds)
    applied.transform("linear", transform)
    if form.act is not None and form.act.static:
        applied.draft("linear").act_params = static_params(form.act, transform.forward(bounds))
    assert_same(found, packed(applied)(x))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradients_pass_through_and_do_not_change_what_is_computed(weight: str) -> None:
    form, x = LinearFormat(WEIGHTS[weight], ACTS["tokens"]), x_of()
    state = decided(form, side="low rank")
    draft = state.draft("linear")
    plain = simulated(draft, x)
    leaves = {"weight": draft.weight.detach().clone(), "bias": draft.bias.detach().clone()}  # pyright: ignore[reportOptionalMemberAccess]
    for leaf in leaves.values():
        leaf.requires_grad_()
    x.requires_grad_()
    with draft.simulated(**leaves):
        learning = draft(x)
    assert_same(learning.detach(), plain)
    learning.square().sum().backward()
    for leaf in (*leaves.values(), x):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


def test_what_is_chosen_for_a_simulation_counts_instead_of_the_drafts_own() -> None:
    form, x = LinearFormat(WEIGHTS["asymmetric channels"], ACTS["static"]), x_of()
    other = decided(form, side="low rank").draft("linear")
    other.range_shares = Clipped(torch.full((O, 1), 0.7), torch.full((O, 1), 0.8))
    assert other.act_params is not None
    other.act_params = Affine(2 * other.act_params.scale, other.act_params.zero)
    draft = decided(form).draft("linear")
    names = ("range_shares", "act_params", "side_terms")
    found = simulated(draft, x, **{name: getattr(other, name) for name in names})
    assert_same(found, simulated(other, x))
    assert not torch.equal(found, simulated(draft, x))


def test_a_number_that_the_format_cannot_hold_shows_in_the_output_and_ends_nothing() -> None:
    draft = decided(LinearFormat(WEIGHTS["symmetric groups"])).draft("linear")
    for weight in (draft.weight * 1e7, draft.weight * torch.nan):
        assert not torch.isfinite(simulated(draft, x_of(), weight=weight)).any()


# Exact, and back


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
def test_an_exact_draft_is_the_linear_it_was_made_of_and_becomes_one_again(kind: type[nn.Module], bias: bool) -> None:
    if kind is Conv1D and not bias:
        pytest.skip("a Conv1D has a bias")
    linear, x = linear_of(kind, bias), x_of()
    block = Alone(linear)
    wanted, stored = linear(x), {name: tensor.clone() for name, tensor in block.state_dict().items()}
    make_drafts(block, ["linear"])
    assert isinstance(block.linear, DraftLinear) and block.linear.weight.shape == (O, I)
    assert_same(block.linear(x), wanted)
    assert block.linear.weight.data_ptr() == linear.get_parameter("weight").data_ptr(), "the weight was copied"
    make_drafts(block, ["linear"])  # once is enough
    with torch.no_grad():
        block.linear.weight.mul_(2)
    unmake_drafts(block)
    assert type(block.linear) is kind and block.state_dict().keys() == stored.keys()
    assert_same(block.state_dict()["linear.weight"], 2 * stored["linear.weight"])
    assert all(tensor.is_contiguous() for tensor in block.state_dict().values())


def test_what_only_a_packed_layer_can_do_keeps_a_draft_from_becoming_a_linear_again() -> None:
    state = decided(LinearFormat(WEIGHTS["tables"]), transforms="scale")
    with pytest.raises(ValueError, match="transforms its input or output itself"):
        unmake_drafts(state.block)


@pytest.mark.parametrize("transforms", [name for name in TRANSFORMS if name != "reassembly"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_a_draft_does_to_its_input_and_output_is_undone_in_its_weight(transforms: str, kind) -> None:
    state, x = decided(LinearFormat(WEIGHTS["floats"]), kind, transforms=transforms), x_of()
    torch.testing.assert_close(state.draft("linear")(x), linear_of(kind)(x), rtol=1e-4, atol=1e-4)


def test_only_a_linear_that_is_to_be_quantized_is_simulated() -> None:
    draft = DraftLinear(linear_of())
    with pytest.raises(AssertionError, match="not to be quantized"), draft.simulated():
        pass
    draft.format = LinearFormat(WEIGHTS["floats"])
    assert not torch.equal(simulated(draft, x_of()), draft(x_of()))
    draft.format = replace(draft.format, weight=Spec(Int(8), PerChannel()))
    assert sqnr_db(draft(x_of()), simulated(draft, x_of())) > 35


def test_a_fit_of_the_extremes_is_the_usual_one_of_grids_that_ranges_place() -> None:
    assert usual_fit(Int(4)) == usual_fit(NF4) == MinMax()
