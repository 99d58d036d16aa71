"""Solve: codes. The last step of a recipe for weights; original linears leave, packed ones take their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.modules import ActSpec, QuantLinear
from lowbit.numerics import Affine, PerChannel, PerInput, PerTensor, QTensor, Samples, Spec, Statistic, serializable
from lowbit.solve import Nearest, Solver
from lowbit.steps.effects import BlockDescription, Freedom, LayerDescription
from lowbit.steps.simulate import usual_fit
from lowbit.steps.state import BlockState, LayerRecord, Stats, set_module
from lowbit.steps.step import RunSizes, Step, names_of
from lowbit.transforms import ChannelTransform, Permute

_CHECK = Samples(256, stride=2)  # tokens on which each layer's output error is measured for the report


@serializable
@dataclass(frozen=True)
class Solve(Step):
    """Hands every linear and the statistics of its input to ``solver``.

    ``true_sequential``: linears are solved stage by stage ({q, k, v}, {o}, {gate, up}, {down}), each stage with
    statistics gathered behind the quantized stages before it; otherwise all see the block as it was.
    """

    solver: Solver = Nearest()
    true_sequential: bool = False

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset(self.solver.needs)

    @property
    def fixes(self) -> frozenset[Freedom]:
        return frozenset({Freedom.CODES})

    def check(self, weights: Sequence[Spec], activations: Sequence[ActSpec], steps: Sequence[Step]) -> None:
        for spec in weights:
            self.solver.check(spec, any(step.places_weight(spec) for step in steps))
        grouped = any(not isinstance(spec.granularity, PerChannel | PerTensor) for spec in weights)
        ordering = [step for step in steps if Freedom.CHANNEL_ORDER in step.fixes]
        if ordering and grouped and self.solver.moves_groups:
            raise ValueError(
                f"{names_of(ordering)} puts input channels in an order, and Solve, with order='act', in another; use order='group' "
                "or static_groups=true"
            )

    def describe(self, block: BlockDescription) -> BlockDescription:
        return block.changed({path: self._solved(layer) for path, layer in block.layers.items()})

    def _solved(self, layer: LayerDescription) -> LayerDescription:
        several = layer.format.weight.granularity.param_shape(layer.shape)[1] > 1
        return replace(layer, ordered=several and self.solver.moves_groups, outliers=self.solver.outliers is not None)

    def memory(self, sizes: RunSizes) -> float:
        solving = max((self.solver.memory(*sizes.shapes[path]) for path in sizes.block.layers), default=0)
        return sizes.statistics_bytes({_CHECK}) + solving

    def ticks(self, windows: int, linears: int) -> int:
        return linears + windows * (4 if self.true_sequential else 1)  # which are read for the report at least

    def run(self, state: BlockState) -> None:
        paths = [path for path in state.resolved.linears if path in state.formats]
        if not self.true_sequential:
            self._solve(state, paths)
            return
        for stage in state.resolved.stages:
            self._solve(state, [path for path in stage if path in state.formats])

    def _solve(self, state: BlockState, paths: list[str]) -> None:
        wanted = {shared.name for shared in state.resolved.shared_inputs if set(shared.readers) & set(paths)}
        needs = self.needs if state.io is None else self.needs | {_CHECK}
        stats = state.collect(needs, wanted)
        for path in paths:
            self._replace(state, path, state.stats_of(stats, path))
            state.tick("solving")

    def _replace(self, state: BlockState, path: str, stats: Stats) -> None:
        linear, form, solver = state.linear(path), state.formats[path], self.solver
        notes: tuple[str, ...] = ()
        if any(need not in stats for need in solver.needs):
            solver, notes = Nearest(usual_fit(form.weight.grid)), ("saw no calibration token: rounded to nearest",)
        w_OI = state.weight_OI(path)
        if not torch.isfinite(w_OI).all():
            raise ValueError(f"{state.full_name(path)}: the weight holds NaN or Inf after the transforms before it")
        try:
            target = w_OI + state.nudge[path] if path in state.nudge else w_OI
            solution = solver.solve(target, form.weight, stats, state.clip.get(path))
        except ValueError as error:
            raise ValueError(f"{state.full_name(path)}: {error}") from error
        bias = linear._parameters.get("bias")
        bias = None if bias is None else bias.detach().to(state.store_dtype)

        post = (*solution.post, *state.post.get(path, ()))
        side = (*solution.side, *state.side.get(path, ()))

        try:
            act_params = _behind(solution.pre, form.act, state.act_params.get(path))
        except ValueError as error:
            raise ValueError(f"{state.full_name(path)}: {error}") from error

        def pack(pre: tuple[ChannelTransform, ...]) -> QuantLinear:
            return QuantLinear.from_qtensor(solution.q, bias, form.act, act_params, pre, post, side)

        error = _output_error(state, path, pack(solution.pre), stats)
        packed = pack((*state.pre.get(path, ()), *solution.pre))
        if any(need.paired for need in self.needs):
            state.originals[path] = linear
        set_module(state.block, path, packed)
        role, name = state.resolved.linears[path], state.full_name(path)
        state.records.append(
            LayerRecord(
                name,
                role,
                packed.bits_per_weight,
                packed.in_features * packed.out_features,
                error,
                _zeroed(w_OI, solution.q),
                (*notes, *solution.notes),
            )
        )


def _behind(pre: tuple[ChannelTransform, ...], act: ActSpec | None, params: Affine | None) -> Affine | None:
    """Static parameters of an input as they are after ``pre``, which the solver chose: scales of channels move with them."""
    if act is None or params is None or not isinstance(act.spec.granularity, PerInput):
        return params
    for transform in pre:
        if not isinstance(transform, Permute):
            raise ValueError(f"a {type(transform).__name__} mixes input channels that have static scales of their own")
        index = transform.index
        params = Affine(params.scale[index], None if params.zero is None else params.zero[index])
    return params


def _zeroed(w_OI: Tensor, q: QTensor) -> float:
    """Share of granules that lost everything. Counts, so that a column order in storage does not matter much."""
    split = q.spec.granularity.split
    before, after = ((split(w) == 0).all(1).sum().item() for w in (w_OI, q.dequantize()))
    return max(0.0, (after - before) / len(q.params[0]))


@torch.no_grad()
def _output_error(state: BlockState, path: str, packed: QuantLinear, stats: Stats) -> float | None:
    """Relative squared error of the packed linear on sampled tokens, run as it will run.

    Samples are what the linear itself reads, so transforms in front of it (its hooks) are done already: ``forward``.
    """
    x_TI = stats.get(_CHECK)
    if x_TI is None:
        return None
    wanted = state.output(path, state.linear(path).forward(x_TI)).double()
    lost = (packed.forward(x_TI).double() - wanted).square().sum()
    return (lost / wanted.square().sum().clamp(min=1e-300)).item()
