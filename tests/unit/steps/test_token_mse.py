"""The error by token: each token counts by its own size, so that massive ones do not drown the others."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.linear_api import LoneLinear, lone_block
from lowbit.modules import LinearFormat, SharedInput
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.steps import BlockIO, BlockMSE, BlockState, Learn, Rounding, TokenMSE, parametrizations

SPEC = Spec(Int(2), PerGroup(16))


def _state(massive: float = 0.0) -> BlockState:
    """A linear whose first token of each window is ``massive`` times as large, with a target that it cannot reach there."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 24, bias=False).requires_grad_(False)
    x = torch.randn(8, 16, 32) @ torch.randn(32, 32)
    x[:, 0] *= max(1.0, massive)
    y = linear(x)
    y[:, 0] += 0.1 * massive * torch.randn(8, 24)
    io = BlockIO(x, y, lambda run, window: run(window))
    return BlockState.of("", LoneLinear(linear), lone_block(linear), {"linear": LinearFormat(SPEC)}, io)


def _error_of_others(state: BlockState) -> float:
    """Relative error of all tokens but the first, with the draft simulated."""
    assert state.io is not None and state.io.y is not None
    with torch.no_grad(), state.draft("linear").simulated():
        found = torch.cat([state.block(window[None]) for window in state.io.x])
    wrong, right = (found - state.io.y)[:, 1:], state.io.y[:, 1:]
    return (wrong.square().sum() / right.square().sum()).item()


def test_every_token_counts_by_its_error_relative_to_its_size():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    output = target + torch.tensor([[[0.5, 0.0], [0.0, 100.0]]])
    assert TokenMSE()(output, target).item() == pytest.approx((0.25 / 25 + 1e4 / 25e4) / 2, rel=1e-6)
    assert BlockMSE()(output, target).item() == pytest.approx((0.25 + 1e4) / 4, rel=1e-6)


def test_a_token_without_a_target_leaves_the_loss_finite():
    target = torch.zeros(1, 2, 4)
    output = target.clone().requires_grad_()
    loss = TokenMSE()(output, target)
    loss.backward()
    assert loss.item() == 0 and output.grad is not None and output.grad.isfinite().all()


def test_massive_tokens_whose_error_cannot_be_corrected_do_not_lead_the_others_astray():
    errors = []
    for objective in (BlockMSE(), TokenMSE()):
        state = _state(massive=300.0)
        Learn((Rounding(0.02),), objective, batch=4, steps=60, descent="sign").run(state)
        errors.append(_error_of_others(state))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["autoround", "omniquant"])
def test_methods_learn_by_token_where_asked(method):
    chosen = [lowbit.recipe(method, by_token=by).steps[0] for by in (False, True)]
    assert [step.objective for step in chosen if isinstance(step, Learn)] == [BlockMSE(), TokenMSE()]


def test_the_second_target_counts_by_token_too():
    state = _state(massive=100.0)
    augmented = lowbit.recipe("omniquant", by_token=True, augment=True).steps[0]
    assert isinstance(augmented, Learn) and augmented.objective == TokenMSE(augment=True)
    Learn((Rounding(0.02),), TokenMSE(augment=True), batch=4, steps=4, descent="sign").run(state)
    assert state.draft("linear").rounding_offset is not None


def test_the_range_of_a_weight_that_stays_is_found_once_and_not_in_every_step(monkeypatch):
    found, plain = [], parametrizations.extremes
    monkeypatch.setattr(parametrizations, "extremes", lambda x: found.append(x) or plain(x))
    Learn((Rounding(0.02),), batch=4, steps=20, descent="sign").run(_state())
    assert len(found) == 2  # one for all steps, and one for the weight that is committed


def test_readers_of_one_input_share_its_conversion_to_the_type_of_products():
    inputs, h = SharedInput(), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        transformed, first = inputs.fake(h, None, None, None)
        assert transformed is h and first.dtype == torch.bfloat16
        assert inputs.fake(h, None, None, None)[1] is first
        assert torch.equal(first, h.bfloat16())
        assert inputs.fake(h.clone(), None, None, None)[1] is not first
    assert SharedInput().fake(h, None, None, None)[1] is h
