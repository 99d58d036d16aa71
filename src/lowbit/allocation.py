"""Allocation: one recipe with a width for each linear, so that the model loses least within a budget of bits.

To second order, a rounding error e of a weight costs the model's loss about ``e F e^T / 2`` with the Fisher information
F. So every linear has a curve: its loss at 2, 3, ... 8 bits. Again and again, the next bit goes to the linear that
gains most per stored bit. The curves are convex, so this is optimal up to the last linear.

Shapes: O output channel, I input channel.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.data import Bos, CalibrationText, calibration_of
from lowbit.modules import LinearFormat
from lowbit.numerics import ClipSearch, Gram, RangeGrid, Spec, quantize, to_dict
from lowbit.plan.layers import planned_layers
from lowbit.plan.model_plan import ModelPlan, plan_model, replan
from lowbit.progress import Progress
from lowbit.recipes import Recipe, as_recipe
from lowbit.scheme import FormatRule
from lowbit.solve.factor import inverse_factor
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.stages.scratch import scratch_directory
from lowbit.steps import BlockState
from lowbit.surroundings import own_settings

WIDTHS = range(2, 9)
_ROWS = 96
"""Output channels of a linear on which its curve is measured; enough for two digits."""
_FIT = ClipSearch(steps=20, max_shrink=0.7, norm=2.0)


@dataclass(frozen=True)
class Allocation:
    """The result of :func:`allocate`.

    Attributes:
        base: the given recipe.
        formats: by the linear's full name.
        bits_per_weight: all stored bits of the quantized linears over their number of weights, counted as in ``plan``.
        loss: expected increase of the loss with the allocation (a proxy; only its ratio to ``loss_before`` means
            something).
        bits_before, loss_before: the same of the given recipe.
        warnings: what the user should know of the text.
    """

    base: Recipe
    formats: Mapping[str, LinearFormat]
    bits_per_weight: float
    loss: float
    bits_before: float
    loss_before: float
    warnings: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The given recipe, with a rule for every format and kind of linear."""
        groups: dict[tuple[str, LinearFormat], list[str]] = defaultdict(list)
        for name, form in self.formats.items():
            number = re.search(r"\.(\d+)\.", name)  # the block's number
            pattern = re.escape(name)
            if number:
                pattern = f"{re.escape(name[: number.start(1)])}(?:{{}}){re.escape(name[number.end(1) :])}"
            groups[pattern, form].append(number[1] if number else "")
        rules = [
            FormatRule(
                match=f"re:^{pattern.replace('{}', '|'.join(numbers))}$", weight=form.weight, activation=form.act
            )
            for (pattern, form), numbers in groups.items()
        ]
        # Where nothing was said of the embedding and the head, wider layers must not decide it.
        scheme = replace(self.base.scheme, outside=self.base.scheme.chosen_outside)
        return replace(self.base, scheme=scheme.with_rules(*rules))

    def by_width(self) -> dict[int, list[str]]:
        """Names of the linears of each width, widest first."""
        widths = {name: _width(form.weight) for name, form in self.formats.items()}
        return {w: [n for n, width in widths.items() if width == w] for w in sorted(set(widths.values()), reverse=True)}

    def to_dict(self) -> dict[str, Any]:
        """The data of a recipe file."""
        summary = (
            f"{self.base.name} at {self.bits_per_weight:.3f} bits a weight, each linear as wide as its sensitivity asks for; "
            f"expected loss {self.loss / self.loss_before:.2f} of that at {self.bits_before:.3f} bits without this choice"
        )
        return {**to_dict(self.recipe), "description": summary}


@own_settings()
def allocate(
    model: str | PathLike[str],
    recipe: Recipe | str | Path | Mapping[str, Any],
    bits: float,
    calibration: CalibrationText = "python-docs",
    *,
    samples: int = 8,
    seq_len: int = 512,
    bos: Bos = "auto",
    widths: Iterable[int] = WIDTHS,
    ram_limit: int = 2**32,
    scratch: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Allocation:
    """Finds a width for every linear that ``recipe`` quantizes, within ``bits`` bits per weight on average.

    It runs one pass for Fisher information (a forward and a backward of the model, block by block; see
    :mod:`lowbit.stages.fisher`) and rounds a sample of every weight at each width.

    Args:
        model, recipe, calibration, samples, seq_len, bos, ram_limit, trust_remote_code: as for :func:`lowbit.quantize`. The
            recipe's grid must have bits to change. Rules that skip linears or quantize activations stay.
        bits: mean number of stored bits per weight, including scales and everything else.
        widths: of codes, to choose from.
        scratch: directory for temporary files; None: the system's.
        progress: called with done, total and the current activity.

    Raises:
        ValueError: a budget that the narrowest width exceeds or the widest does not use up, a grid without bits, and what
            ``quantize`` would refuse.
    """
    base = as_recipe(recipe)
    widths = sorted(set(widths))
    if not widths:
        raise ValueError("there are no widths to choose from: expected one at least, such as widths=[2, 3, 4]")
    plan = plan_model(model, base, trust_remote_code=trust_remote_code)
    at_width = {width: replan(plan.source, plan.architecture, plan.model, _all_at(base, width)) for width in widths}
    given, stored = _bits(plan), {width: _bits(other) for width, other in at_width.items()}
    forms = {f"{block.name}.{path}": form for block in plan.blocks for path, form in block.formats.items()}
    sizes = {f"{block.name}.{path}": math.prod(block.shapes[path]) for block in plan.blocks for path in block.formats}
    if not sizes:
        raise ValueError(f"recipe {base.name!r} quantizes no linear of this model")
    total = sum(sizes.values())
    cost = {
        name: {_width(forms[name].weight): given[name] * size} | {width: stored[width][name] * size for width in widths}
        for name, size in sizes.items()
    }
    _check_budget(
        bits, widths, [sum(each[width] for each in cost.values()) / total for width in (widths[0], widths[-1])]
    )
    text = calibration_of(plan.source, calibration, samples, seq_len, bos)
    curves: dict[str, dict[int, float]] = {}
    before = 0.0
    with scratch_directory("lowbit-allocate", None if scratch is None else Path(scratch)) as folder:
        journal = Journal(folder / "allocate", {})
        journal.open()
        walk = Walk(plan, text.ids, journal, ram_limit, progress=progress or (lambda *_: None))
        try:
            for state, f_OI in walk.originals():
                for path, (loss_at, least) in _curves(state, f_OI, base, widths).items():
                    name = f"{state.name}.{path}"
                    curves[name], before = loss_at, before + least
        finally:
            walk.close()
            journal.close()
    chosen = spend(curves, cost, bits * total)
    return Allocation(
        base,
        {name: replace(forms[name], weight=_at(forms[name].weight, width)) for name, width in chosen.items()},
        sum(cost[name][width] for name, width in chosen.items()) / total,
        sum(curves[name][width] for name, width in chosen.items()),
        sum(given[name] * size for name, size in sizes.items()) / total,
        before,
        text.warnings,
    )


def _check_budget(bits: float, widths: Sequence[int], reached: Sequence[float]) -> None:
    """Checks that codes of some of the ``widths`` take ``bits`` bits a weight; ``reached``: what the narrowest and the widest take."""
    least, most = (
        math.ceil(1000 * each) / 1000 for each in reached
    )  # as they are said, so that either can be asked for
    if not reached[0] <= bits <= most:
        rising = "ask for more, or use larger groups" if bits < least else f"ask for {most:.3f} at most"
        codes, takes = (
            f"{a} to {b}" if a != b else a for a, b in ((widths[0], widths[-1]), (f"{least:.3f}", f"{most:.3f}"))
        )
        raise ValueError(
            f"{bits} bits a weight were asked for; with codes of {codes} bits this recipe takes {takes}, everything stored counted: {rising}"
        )


def spend(
    losses: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """The width of each name: the next width goes to the name that gains most per bit, while the budget has room.

    Args:
        losses: by name, then by the name's possible widths in rising order.
        cost: by name, then by width; rises with the width.
        budget: largest total cost.
    """
    widths = {name: list(curve) for name, curve in losses.items()}
    at = dict.fromkeys(losses, 0)
    left = budget - sum(cost[name][each[0]] for name, each in widths.items())
    while True:
        best, who = 0.0, None
        for name, i in at.items():
            if i + 1 == len(widths[name]):
                continue
            now, following = widths[name][i : i + 2]
            price = cost[name][following] - cost[name][now]
            gain = (losses[name][now] - losses[name][following]) / price
            if price <= left and gain > best:
                best, who = gain, name
        if who is None:
            return {name: widths[name][i] for name, i in at.items()}
        now, following = widths[who][at[who] : at[who] + 2]
        left -= cost[who][following] - cost[who][now]
        at[who] += 1


def _curves(
    state: BlockState, f_OI: Mapping[str, Tensor], recipe: Recipe, widths: list[int]
) -> dict[str, tuple[dict[int, float], float]]:
    """For each path: the model's loss from that linear at each width, and at the given recipe's width.

    The loss is half of ``sum_o G_o e_o H e_o^T``. e is the rounding error of the weight as the steps before the solver
    leave it, H the Gram matrix of its input, and ``G_o = sum_j F_oj / sum_j H_jj`` the squared gradient of output o:
    Fisher information is nearly ``G_o H``. A solver that knows H makes errors that H hardly sees: with the factors of
    ``H = U^T D U``, its loss is ``|e_o|^2 tr(D) / I`` (arXiv:2307.13304, theorem 1).
    """
    gradients = {}
    for path, stats in _grams(state).items():
        gradients[path] = f_OI[path].sum(1) / stats.diagonal().sum().clamp(min=1e-30)
    for step in recipe.steps[:-1]:
        step.run(state)
    curves = {}
    for path, H in _grams(state).items():
        spec, w_OI, g_O = state.formats[path].weight, state.draft(path).weight, gradients[path]
        if state.draft(path).post:  # outputs are mixed, and so are their gradients
            g_O = g_O.mean().expand_as(g_O)
        curve = error_by_width(w_OI, g_O, H, spec, recipe, {*widths, _width(spec)})
        curves[path] = {width: curve[width] for width in widths}, curve[_width(spec)]
    for path in state.formats.keys() - curves.keys():  # no token came: an expert that was never chosen
        curves[path] = {_width(state.formats[path].weight): 0.0}, 0.0
    return curves


def _grams(state: BlockState) -> dict[str, Tensor]:
    """Gram matrix ``[I, I]`` of each linear's input, by path, without linears that saw no token."""
    stats = state.collect([Gram()])
    grams = {path: state.stats_of(stats, path).get(Gram()) for path in state.formats}
    return {path: H for path, H in grams.items() if H is not None}


def error_by_width(
    w_OI: Tensor, g_O: Tensor, H: Tensor, spec: Spec, recipe: Recipe, widths: Iterable[int]
) -> dict[int, float]:
    """The loss from one linear at each width, estimated on a sample of its output channels.

    Args:
        w_OI: the weight.
        g_O: squared gradient of each output.
        H: Gram matrix of the input, ``[I, I]``.
        spec: the weight's format.
        recipe: its last step solves.
        widths: of codes.
    """
    solver = recipe.steps[-1].solver
    picked = torch.linspace(0, len(w_OI) - 1, min(_ROWS, len(w_OI))).long()
    w, g = w_OI[picked].float(), g_O[picked]
    share = len(w_OI) / len(picked) / 2
    fit = _FIT if isinstance(spec.grid, RangeGrid) else solver.fit
    U = inverse_factor(H, solver.damp)[0] if Gram() in solver.needs else None
    kept = None if U is None else (U.diagonal() ** -2).mean().item()

    def lost(width: int) -> float:
        e = quantize(w, _at(spec, width), fit).dequantize() - w
        rows = e.square().sum(1) * kept if kept is not None else (e @ H.to(e) * e).sum(1)
        return share * (g * rows).sum().item()

    return {width: lost(width) for width in widths}


def _width(spec: Spec) -> int:
    return spec.grid.bits


def _at(spec: Spec, width: int) -> Spec:
    if "bits" not in {field.name for field in fields(spec.grid)}:  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"there are no widths to choose from: the recipe's weights are of the grid {type(spec.grid).__name__}, which has one width; "
            "expected integers or another grid with bits"
        )
    return replace(spec, grid=replace(spec.grid, bits=width))  # pyright: ignore[reportArgumentType]


def _all_at(base: Recipe, width: int) -> Recipe:
    rules = (
        rule if rule.weight is None else replace(rule, weight=_at(rule.weight, width)) for rule in base.scheme.rules
    )
    return replace(base, scheme=replace(base.scheme, rules=tuple(rules)))


def _bits(plan: ModelPlan) -> dict[str, float]:
    """Stored bits per weight, by layer."""
    return {layer.name: layer.bits_per_weight for layer in planned_layers(plan)}
