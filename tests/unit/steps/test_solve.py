"""Solve: in which order linears are solved, and what is still in memory meanwhile."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import pytest

from lowbit.modules import LinearFormat
from lowbit.numerics import Gram, Int, MinMax, PerGroup, Spec
from lowbit.solve import Nearest, Solver
from lowbit.steps import BlockState, Solve

import helpers
from helpers import tiny_llama

SPEC = Spec(Int(4), PerGroup(16))


@dataclass(frozen=True)
class Watching(Solver):
    """Rounds to nearest, and notes which matrices and weights of earlier calls are still there."""

    seen: list = field(default_factory=list, compare=False)
    alive: list = field(default_factory=list, compare=False)

    @property
    def needs(self):
        return frozenset({Gram()})

    def solve(self, w_OI, spec, stats, clip=None):
        gone = [(width, gram(), weight()) for width, gram, weight in self.seen]
        self.alive.append(
            (w_OI.shape[1], sum(w is not None for *_, w in gone), {n for n, g, _ in gone if g is not None})
        )
        self.seen.append((w_OI.shape[1], weakref.ref(stats[Gram()]), weakref.ref(w_OI)))
        return Nearest(MinMax()).solve(w_OI, spec, {}, clip)


@pytest.fixture
def state(tmp_path):
    block, resolved, io = helpers.first_block(tiny_llama(tmp_path))
    return BlockState.of("model.layers.0", block, resolved, {p: LinearFormat(SPEC) for p in resolved.linears}, io)


def test_the_widest_input_is_solved_last_and_alone(state):
    solver = Watching()
    linears = list(state.drafts)
    Solve(solver).run(state)
    widths = [width for width, *_ in solver.alive]
    assert widths == sorted(widths) and widths[-1] > widths[0]
    assert not any(weights for _, weights, _ in solver.alive), "a weight outlives its packed layer"
    assert solver.alive[-1][2] == set(), "a matrix outlives the last linear that reads it"
    assert [record.name for record in state.records] == [f"model.layers.0.{path}" for path in linears]
