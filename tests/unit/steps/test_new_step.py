"""A step that only this file knows: everything that reads recipes handles it by its declarations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

import lowbit
from lowbit.architectures import Kind
from lowbit.modules import ActSpec, QuantLinear
from lowbit.numerics import AbsMax, PerTensor, Spec, Statistic, serializable, to_dict
from lowbit.plan import explain, plan
from lowbit.recipes import Recipe, from_plain, mix, recipe
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import (
    BlockDescription,
    BlockState,
    Freedom,
    Learn,
    MixOrder,
    Search,
    SearchClip,
    Set,
    SetActivationRange,
    Shifts,
    Smooth,
    Solve,
    Step,
)
from lowbit.steps.parametrizations import Maker
from lowbit.steps.step import RunSizes
from lowbit.transforms import Scale

from helpers import random_ids, tiny_llama

KEPT = 2**33
"""Bytes that the step below says it keeps, more than anything else on a tiny model."""


@serializable
@dataclass(frozen=True)
class DivideInputs(Step):
    """Divides every input by its largest magnitude, at run time in the linears that read it."""

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({AbsMax()})

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({Kind.SCALE})

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CHANNEL_BASIS})

    @property
    def mix_order(self) -> MixOrder:
        return MixOrder.AFTER_TRANSFORMS

    @property
    def learns(self) -> bool:
        return True

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        if any(isinstance(spec.granularity, PerTensor) for spec in weights):
            raise ValueError("DivideInputs gives columns sizes of their own, and one range serves them all")

    def describe(self, block: BlockDescription) -> BlockDescription:
        return block.changed(
            {path: layer.running(Scale(torch.ones(layer.shape[1]))) for path, layer in block.layers.items()}
        )

    def memory(self, sizes: RunSizes) -> float:
        return KEPT

    def ticks(self, windows: int, linears: int) -> int:
        return windows

    def run(self, state: BlockState) -> None:
        stats = state.collect(self.needs)
        for shared in state.resolved.shared_inputs:
            readers = [path for path in shared.readers if path in state.formats]
            largest = stats[shared.name][AbsMax()].clamp(min=1e-3)
            for path in readers:
                state.transform(path, Scale(largest))


FORMAT = linears(weight(8, 16))
STATIC = linears(weight(8, 16), activation(8, per="tensor", static=True))
NORMS = Set(Smooth(), ("norm_*",))


def of_steps(*steps: Step, scheme=FORMAT) -> Recipe:
    return Recipe.blockwise("mine", scheme, (*steps, Solve(Nearest())))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def test_combinations_are_checked_by_what_it_declares():
    with pytest.raises(ValueError, match="Set transforms channels that DivideInputs has mixed by then"):
        of_steps(DivideInputs(), NORMS)
    with pytest.raises(ValueError, match="DivideInputs transforms channels whose static activation ranges are fixed"):
        of_steps(SetActivationRange(), DivideInputs(), scheme=STATIC)
    with pytest.raises(ValueError, match="one range serves them all"):
        of_steps(DivideInputs(), scheme=linears(Spec(weight(8, None).grid, PerTensor())))
    built = of_steps(NORMS, DivideInputs())
    assert from_plain(to_dict(built)) == built
    assert built.learns and built.reads_inputs and built.needs_calibration


def test_a_mix_puts_it_where_it_asks_to_be():
    steps = mix("both", [of_steps(DivideInputs()), recipe("awq")]).steps
    assert [type(step) for step in steps] == [Search, DivideInputs, SearchClip, Solve]


def test_plan_explanation_and_peak_memory_count_what_it_adds(model):
    with_it, without = of_steps(NORMS, DivideInputs()), of_steps(NORMS)
    planned, plain = plan(model, with_it), plan(model, without)
    inputs = sum(layer.shape[1] for layer in planned.layers if not layer.reason)
    assert planned.bytes_out == plain.bytes_out + 4 * inputs
    assert "layers keep scales of inputs" in planned.compatibility["GPTQ format"]
    terms = planned.peak_ram_parts["block"]
    assert terms["step DivideInputs"] > KEPT > plain.peak_ram_parts["block"].get("step Solve", 0)
    explanation = explain(with_it, model)
    assert explanation.steps[1].startswith("DivideInputs: Divides every input by its largest magnitude")
    assert explanation.layers == planned.layers


def test_a_run_stores_what_the_plan_says(model, tmp_path):
    wanted = of_steps(NORMS, DivideInputs())
    report = lowbit.quantize(model, wanted, random_ids(2, 16), out=tmp_path / "q")
    assert report.bits_per_weight == pytest.approx(plan(model, wanted).bits_per_weight, rel=1e-12)
    packed = [m for m in lowbit.load(tmp_path / "q").modules() if isinstance(m, QuantLinear)]
    assert packed and all([type(transform) for transform in layer.pre] == [Scale] for layer in packed)
    assert report.kl is not None and report.kl < 0.05


@dataclass(frozen=True)
class _Order(Maker):
    """Declares that it decides the rounding of weights, and does nothing."""

    lr: float = 1e-3

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.ROUNDING})


def test_learning_declares_what_its_makers_do():
    step = Learn((_Order(), Shifts(("norm_*",))))
    assert step.fixes == {Freedom.ROUNDING} and step.kinds == {Kind.SHIFT}
    assert step.transforms == Shifts(("norm_*",)).transforms
    assert step.disturbs == Shifts(("norm_*",)).disturbs
    assert step.mix_order is MixOrder.AS_GIVEN
