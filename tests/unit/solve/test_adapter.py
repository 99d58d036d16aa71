"""Low-rank terms beside codes: where they start, and that the starts are the best of their rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.numerics import Gram, Int, LowRank, PerGroup, Spec
from lowbit.plan import plan
from lowbit.solve import Adapter, Gptq, Nearest, SignValue, Solution
from lowbit.steps import Solve

from helpers import tiny_llama

O, I, R = 24, 40, 5
SPEC = Spec(Int(3), PerGroup(8), scale_dtype="float32")


def weight() -> Tensor:
    return torch.randn(O, I, generator=torch.Generator().manual_seed(3))


def inputs(tokens: int = 400) -> Tensor:
    """Channels that are correlated and of sizes that differ."""
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(tokens, I, generator=generator) @ torch.randn(I, I, generator=generator) * torch.logspace(-1, 1, I)
    )


def solved(adapter: Adapter, solver=Nearest(), x: Tensor | None = None) -> Solution:
    x = inputs() if x is None else x
    return adapter.solve(solver, weight(), SPEC, {Gram(): x.T @ x}, None, seed=1)


def lost(solution: Solution, *, with_term: bool = True) -> Tensor:
    """What the layer lacks of the weight, for its own input."""
    terms = solution.side if with_term else solution.side[:-1]
    stored = solution.q.dequantize().double() + sum(term.dense((O, I)).double() for term in terms)
    for transform in solution.pre:  # the stored weight reads the transformed input
        stored = transform.forward(torch.eye(I).double()).double() @ stored.T
        stored = stored.T
    return weight().double() - stored


def cost(error: Tensor, x: Tensor) -> float:
    """Of the outputs: ``|x E^T|^2``."""
    return (x.double() @ error.T).square().sum().item()


def test_zero_leaves_what_the_codes_say_and_draws_the_other_factor_from_the_seed():
    found, plain = solved(Adapter(R)), Nearest().solve(weight(), SPEC, {})
    assert torch.equal(found.q.codes, plain.q.codes)
    (term,) = found.side
    assert (
        isinstance(term, LowRank)
        and not term.b.any()
        and term.a.abs().max() <= I**-0.5
        and term.a.std() > 0.4 * I**-0.5
    )
    again, other = solved(Adapter(R)).side[0], Adapter(R).solve(Nearest(), weight(), SPEC, {}, None, seed=2).side[0]
    assert torch.equal(again.a, term.a) and not torch.equal(other.a, term.a)


def test_the_residual_start_is_the_best_of_its_rank():
    found = solved(Adapter(R, "residual"))
    singular = torch.linalg.svdvals(lost(found, with_term=False))
    best = singular[R:].square().sum().item()
    assert best * (1 - 1e-9) <= lost(found).square().sum().item() <= best * (1 + 1e-3)  # factors are in float16


@pytest.mark.parametrize("solver", [Nearest(), Gptq(), Gptq(order="act")], ids=["nearest", "gptq", "gptq, own order"])
def test_the_calibrated_start_is_the_best_of_its_rank_for_the_outputs(solver):
    """No term of this rank costs outputs less: the tail of the singular values of the whitened residual, in float64."""
    x = inputs()
    found = solved(Adapter(R, "calibrated", damp=0.0), solver, x)
    h = x.double().T @ x.double()
    values, vectors = torch.linalg.eigh(h)
    whitened = lost(found, with_term=False) @ vectors * values.clamp(min=0).sqrt()
    best = torch.linalg.svdvals(whitened)[R:].square().sum().item()
    assert best * (1 - 1e-5) <= cost(lost(found), x) <= best * (1 + 1e-2)
    plain = solved(Adapter(R, "residual"), solver, x)
    assert cost(lost(found), x) < 0.9 * cost(lost(plain), x) < cost(lost(plain, with_term=False), x)


def test_inputs_that_no_token_shows_do_not_make_the_calibrated_start_large():
    x = inputs()
    x[:, ::2] = 0
    for damp in (0.0, 0.01):
        term = solved(Adapter(R, "calibrated", damp=damp), x=x).side[0]
        assert term.a.isfinite().all() and term.a.abs().max() < 50
    dead = Adapter(R, "calibrated").solve(Nearest(), weight(), SPEC, {Gram(): torch.zeros(I, I)}, None, seed=1)
    assert torch.equal(dead.side[0].a, solved(Adapter(R, "residual")).side[0].a)


def test_rounds_bring_codes_and_term_closer_to_the_weight_together():
    errors = [lost(solved(Adapter(R, "residual", rounds=n))).square().sum().item() for n in (1, 5)]
    assert errors[1] < errors[0]


def test_a_rank_beyond_the_weights_is_filled_with_zeros():
    found = solved(Adapter(O + 3, "residual"))
    assert found.side[0].a.shape == (O + 3, I) and not found.side[0].a[O:].any()
    assert lost(found).abs().max() < 2e-3


def test_a_plan_foresees_the_bits_and_targets_say_which_linears_have_a_term(tmp_path):
    place = tiny_llama(tmp_path / "model")
    adapter = Adapter(4, targets=("attention", "*down_proj"))
    base = lowbit.recipe("rtn", bits=4, group_size=32)
    recipe = base.with_blockwise(steps=(Solve(adapter=adapter),))
    report = lowbit.quantize(place, recipe, None, out=tmp_path / "out")
    layers = {layer.name: layer.bits_per_weight for block in report.blocks for layer in block.layers}
    planned = {row.name: row.bits_per_weight for row in plan(place, recipe).layers}
    assert {name: planned[name] for name in layers} == pytest.approx(layers)
    loaded = lowbit.load(tmp_path / "out")
    with_terms = {n.rpartition(".")[2] for n, m in loaded.named_modules() if getattr(m, "side_terms", ())}
    assert with_terms == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "a rank and rounds of 1 or more"),
        ({"rounds": 2}, "rounds are of start='residual'"),
        ({"start": "pissa"}, "start is one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Adapter(**options)


def test_solvers_that_transform_outputs_or_inputs_themselves_are_refused_where_a_start_cannot_follow():
    linear = nn.Linear(I, O)
    signs = lowbit.recipe("onebit", tokens=0).with_blockwise(
        steps=(Solve(SignValue(), adapter=Adapter(2, "residual")),)
    )
    with pytest.raises(ValueError, match="transforms the outputs of linears itself; use start='zero'"):
        lowbit.quantize_linear(linear, torch.randn(64, I), signs)
    with pytest.raises(ValueError, match="use rounds=1"):
        solved(Adapter(R, "residual", rounds=2), Gptq(order="act"))
