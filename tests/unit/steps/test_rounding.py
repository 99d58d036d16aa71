"""Learned rounding: the stored weight is the learned one, and is better than rounding to nearest."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.linear_api import LoneLinear, lone_block
from lowbit.modules import LinearFormat
from lowbit.numerics import ClipSearch, Fixed, Int, PerGroup, Spec
from lowbit.recipes import Recipe
from lowbit.scheme import linears
from lowbit.solve import Gptq, Nearest
from lowbit.steps import BlockIO, BlockState, Learn, Rounding, Solve

from helpers import random_ids, tiny_llama

SPEC = Spec(Int(2), PerGroup(16))


def _state(seed: int = 0, width: int = 32, spec: Spec = SPEC) -> BlockState:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(width, 24, bias=False).requires_grad_(False)
    x = torch.randn(8, 16, width) @ torch.randn(width, width)  # correlated channels, which rounding can exploit
    block = LoneLinear(linear)
    y = torch.cat([block(window[None]) for window in x])
    io = BlockIO(x, y, lambda run, window: run(window))
    return BlockState.of("", block, lone_block(linear), {"linear": LinearFormat(spec)}, io)


def _learn(steps: int = 60) -> Learn:
    return Learn((Rounding(0.02),), batch=4, steps=steps, descent="sign")


def _error(state: BlockState) -> float:
    assert state.io is not None and state.io.y is not None
    found = torch.cat([state.block(window[None]) for window in state.io.x])
    return ((found - state.io.y).square().sum() / state.io.y.square().sum()).item()


def test_the_stored_codes_are_the_learned_ones_exactly():
    state = _state()
    _learn().run(state)
    learned = state.draft("linear").weight + state.draft("linear").rounding_offset
    clip = state.draft("linear").range_shares
    assert isinstance(clip, Fixed)
    Solve(Nearest()).run(state)
    q = state.block.linear.qtensor()
    assert torch.equal(q.params.scale, clip.params.scale) and torch.equal(q.params.zero, clip.params.zero)
    again = SPEC.grid.encode(SPEC.granularity.split(learned), clip.params)
    assert torch.equal(SPEC.granularity.join(again, (24, 32)), q.codes)
    moved = (q.codes != Nearest().solve(_state().draft("linear").weight, SPEC, {}).q.codes).float().mean()
    assert moved > 0.05, "nothing was learned"


def test_learned_rounding_beats_nearest_and_its_error_is_reported_against_the_original():
    plain, learned = _state(), _state()
    Solve(Nearest()).run(plain)
    _learn().run(learned)
    Solve(Nearest()).run(learned)
    assert _error(learned) < 0.8 * _error(plain)
    assert learned.records[0].error == pytest.approx(_error(learned), rel=0.3)  # measured on a sample of the tokens


def test_no_steps_leave_rounding_to_nearest():
    plain, untouched = _state(), _state()
    Solve(Nearest()).run(plain)
    _learn(0).run(untouched)
    Solve(Nearest()).run(untouched)
    assert torch.equal(plain.block.linear.codes, untouched.block.linear.codes)


def test_signed_descent_moves_every_offset_by_at_most_the_sum_of_its_rates():
    state = _state()
    _learn(2).run(state)  # one pass of two steps, at rates 0.02 and 0.01
    scale = state.draft("linear").range_shares.params.scale.view(24, 2).repeat_interleave(16, 1)
    assert (state.draft("linear").rounding_offset / scale).abs().max() <= 0.03 + 1e-5


def test_a_whole_run_with_learned_rounding_is_better_than_without(tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(8, 32)
    kls = []
    for name, recipe in (
        ("rtn", lowbit.recipe("rtn", bits=3, group_size=32)),
        ("autoround", lowbit.recipe("autoround", bits=3, group_size=32, steps=40, batch=4, amp=False)),
    ):
        kls.append(lowbit.quantize(model, recipe, ids, out=tmp_path / name, max_kl=50).kl)
    assert kls[1] < 0.8 * kls[0]


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_what_is_learned_for_a_type_with_two_levels_of_scales_is_what_is_stored(name):
    kind = BLOCK_TYPES[name]
    plain, learned = (_state(width=512, spec=kind.spec) for _ in range(2))
    Solve(Nearest()).run(plain)
    _learn(40).run(learned)
    draft = learned.draft("linear")
    with draft.simulated():
        foreseen = draft(learned.io.x[:2])
    Solve(Nearest()).run(learned)
    torch.testing.assert_close(learned.block(learned.io.x[:2]), foreseen, rtol=1e-5, atol=1e-4)
    assert _error(learned) < 0.9 * _error(plain)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_scales_of_two_levels_that_were_stored_are_stored_again_as_they_are(name):
    spec, w = BLOCK_TYPES[name].spec, torch.randn(9, 1024, generator=torch.Generator().manual_seed(0))
    columns = spec.granularity.param_shape((9, 1024))[1]
    once = spec.as_stored(ClipSearch()(spec.granularity.split(w), spec.grid), columns)
    again = spec.as_stored(once, columns)
    assert spec.settles and all(torch.equal(a, b) for a, b in zip(once, again, strict=True) if a is not None)


def test_learned_rounding_refuses_quantized_scales_and_grids_without_a_range():
    second = Spec(Int(3), PerGroup(16), stats=Spec(Int(4), PerGroup(8)))
    state = _state()
    state.draft("linear").format = LinearFormat(second)
    with pytest.raises(ValueError, match="stored as they are"):
        _learn(1).run(state)
    with pytest.raises(ValueError, match="not placed by a range"):
        lowbit.recipe("autoround+lut-gemm", group_size=16)
    with pytest.raises(ValueError, match="order='act' forms other groups"):
        Recipe.blockwise(name="x", scheme=linears(SPEC), steps=(_learn(), Solve(Gptq(order="act"))))
