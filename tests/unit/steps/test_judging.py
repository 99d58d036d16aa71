"""The least error among candidates: the same one as by whole sums, on any number of threads."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, nan

import pytest
import torch

from lowbit.modules import LinearFormat
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.scheme import activation
from lowbit.steps import BlockState
from lowbit.steps.judging import Product, condensed, errors_of, least_error
from lowbit.steps.listen import Place, listen
from lowbit.transforms import Scale

import helpers
from helpers import tiny_llama

W3 = Spec(Int(3), PerGroup(16))


@pytest.fixture
def state(tmp_path):
    block, resolved, io = helpers.first_block(tiny_llama(tmp_path))
    formats = {path: LinearFormat(W3) for path in resolved.linears}
    return BlockState.of("model.layers.0", copy.deepcopy(block), resolved, formats, io)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Known:
    """A piece whose error is that of the candidate that runs."""

    of: list[float]
    runs: list[int]
    place: Place = Place("mlp")

    def errors(self, state: BlockState) -> torch.Tensor:
        return torch.tensor([self.of[self.runs[-1]]], dtype=torch.float64)


def chosen(state: BlockState, errors: list[list[float]]) -> tuple[int, list[int]]:
    """The candidate chosen where candidate i errs by ``errors[i]``, and the candidates in the order in which they ran."""
    runs: list[int] = []

    @contextmanager
    def run(i: int):
        runs.append(i)
        yield

    pieces = [Known(list(of_piece), runs) for of_piece in zip(*errors, strict=True)]
    return least_error(state, pieces, range(len(errors)), run), runs


def test_the_first_of_equals_is_chosen_and_nan_never_before_a_number(state, threads):
    assert chosen(state, [[nan] * 16, [2.0] * 16, [1.0] * 16, [1.0] * 16])[0] == 2
    assert chosen(state, [[1.0] * 15 + [nan], [inf] * 16])[0] == 1
    assert chosen(state, [[nan] * 16] * 2)[0] == 0
    assert chosen(state, [[3.0], [1.0]])[0] == 1


def test_a_candidate_that_begins_well_and_ends_badly_loses(state, threads):
    assert chosen(state, [[2.0] * 32, [0.0] * 31 + [100.0], [3.0] * 32])[0] == 0


def test_a_candidate_that_is_lost_at_the_probe_does_not_run_again(state):
    assert chosen(state, [[1.0] * 16, [100.0] * 16])[1] == [0, 1, 0]


def test_errors_are_in_the_order_of_calls_and_end_beyond_the_limit(state, threads):
    pieces = [Known([e], [0]) for e in (1e8, 1.0, -1e8, 1.0)]
    assert errors_of(state, pieces).tolist() == [1e8, 1.0, -1e8, 1.0]
    assert errors_of(state, pieces, beyond=10.0).tolist() == [1e8]


@pytest.mark.parametrize("place", [Place("mlp"), Place("mlp", "mlp.down_proj"), Place("self_attn.o_proj")])
def test_an_error_is_that_of_the_recorded_calls(state, threads, place):
    calls = listen(state, [place])
    with state.draft("mlp.up_proj").simulated(), state.draft("self_attn.o_proj").simulated():
        again = listen(state, [place])
        total = errors_of(state, calls).sum().item()
    assert len(calls) == len(state.io)
    expected = sum((a.answer - b.answer).square().sum().item() for a, b in zip(again, calls, strict=True))
    if place.module == "mlp":  # its input comes from attention, which the recorded calls hold fixed
        assert total > 0
    else:
        assert total == pytest.approx(expected, rel=1e-5)


def test_calls_of_a_linear_whose_weight_alone_errs_become_one_product(state):
    place, draft = Place("mlp.down_proj"), state.draft("mlp.down_proj")
    calls = listen(state, [place, Place("mlp")])
    pieces = condensed(state, calls, candidates=1000)
    (product,) = (piece for piece in pieces if isinstance(piece, Product))
    assert len(pieces) == 1 + len(state.io) and product.place == place
    scale = Scale(torch.linspace(0.5, 2, draft.weight.shape[1]))
    for transform in (None, scale):
        with draft.simulated(transform):
            whole = errors_of(state, product.calls).sum().item()
            assert whole > 0 and errors_of(state, [product]).sum().item() == pytest.approx(whole, rel=1e-4)


def test_few_candidates_or_quantized_inputs_leave_calls_as_they_are(state):
    calls = listen(state, [Place("mlp.down_proj")])
    assert condensed(state, calls, candidates=1) == calls
    state.draft("mlp.down_proj").format = LinearFormat(W3, activation(8))
    assert condensed(state, calls, candidates=1000) == calls
