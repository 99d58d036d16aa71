"""Bits where they count: one recipe, each linear at the width that loses least for what the whole model may take.

To second order, rounding weight w of the model costs its loss about ``F_w (w - q(w))^2 / 2``, F the Fisher information. So every
linear has a curve, what it loses at 2, 3, ... 8 bits, and the best widths under a budget are found by giving the next bit to
whoever loses least per stored bit for it, again and again (the curves are convex, so this is optimal up to the last linear).
On models whose key and value heads are shared, v is worth two bits more than an MLP, and so are a few down projections.

A column solver errs less than rounding to nearest does, but at all widths alike; only ratios matter here.
Shapes: O output channel, I input channel.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.calibrate.data import Calibration, calibration_of
from lowbit.calibrate.journal import Journal
from lowbit.calibrate.walk import Walk
from lowbit.numerics import ClipSearch, RangeGrid, Spec, quantize
from lowbit.plan.layers import planned_layers
from lowbit.plan.survey import survey
from lowbit.recipe import Recipe, Rule, Scheme, rebuilt
from lowbit.recipes import as_recipe
from lowbit.steps import Incoherence, LinearFormat
from lowbit.steps.state import stored_as_OI

WIDTHS = range(2, 9)
_ROWS = 96
"""Output channels of a linear that its curve is measured on; enough for two digits."""
_FIT = ClipSearch(steps=20, max_shrink=0.7, norm=2.0)

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Allocation:
    """What :func:`allocate` chose.

    Attributes:
        base: the recipe as it was given.
        formats: by the linear's full name.
        bits_per_weight: everything stored for the quantized linears over their weights, as ``plan`` counts it.
        loss, loss_before: expected increase of the loss (a proxy; only their ratio means something), of the allocation and
            of the recipe as given.
        bits_before: bits per weight of the recipe as given.
    """

    base: Recipe
    formats: Mapping[str, LinearFormat]
    bits_per_weight: float
    loss: float
    bits_before: float
    loss_before: float

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was given, with a rule for every format and kind of linear."""
        groups: dict[tuple[str, LinearFormat], list[str]] = defaultdict(list)
        for name, form in self.formats.items():
            number = re.search(r"\.(\d+)\.", name)  # of the block
            pattern = re.escape(name)
            if number:
                pattern = f"{re.escape(name[: number.start(1)])}(?:{{}}){re.escape(name[number.end(1) :])}"
            groups[pattern, form].append(number[1] if number else "")
        rules = [
            Rule(match=f"re:^{pattern.replace('{}', '|'.join(numbers))}$", weight=form.weight, activation=form.act)
            for (pattern, form), numbers in groups.items()
        ]
        return rebuilt(self.base, scheme=Scheme(rules=(*self.base.scheme.rules, *rules)))

    def by_width(self) -> dict[int, list[str]]:
        """Names of the linears of each width, the widest first."""
        widths = {name: _width(form.weight) for name, form in self.formats.items()}
        return {w: [n for n, width in widths.items() if width == w] for w in sorted(set(widths.values()), reverse=True)}

    def to_dict(self) -> dict[str, Any]:
        """A recipe file's data."""
        said = (
            f"{self.base.name} at {self.bits_per_weight:.3f} bits a weight, each linear as wide as its sensitivity asks for; "
            f"expected loss {self.loss / self.loss_before:.2f} of that at {self.bits_before:.3f} bits without this choice"
        )
        return {**self.recipe.to_dict(), "description": said}


def allocate(
    model: str | PathLike[str],
    recipe: Recipe | str | Path | Mapping[str, Any],
    bits: float,
    calibration: str | Tensor | Calibration = "python-docs",
    *,
    samples: int = 8,
    seq_len: int = 512,
    widths: Iterable[int] = WIDTHS,
    ram_limit: int = 2**32,
    scratch: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Allocation:
    """Finds a width for every linear that ``recipe`` quantizes, so that all of them take ``bits`` a weight at most.

    Needs one pass for Fisher information (a forward and a backward of the model, a block at a time; see
    :mod:`lowbit.calibrate.fisher`) and rounds a sample of every weight at each width.

    Args:
        model, recipe, calibration, samples, seq_len, ram_limit: as for :func:`lowbit.quantize`; the recipe's grid must have
            bits to change. Rules of the recipe that skip linears, or quantize activations, stay.
        bits: stored bits a weight on average, scales and everything else counted.
        widths: of codes, among which to choose.
        scratch: for temporary files (default: the system's).

    Raises:
        ValueError: a budget that the narrowest width exceeds, a grid without bits, and what ``quantize`` would refuse.
    """
    base, report = as_recipe(recipe), progress or (lambda *_: None)
    widths = sorted(set(widths))
    given, stored = _bits(model, base), {width: _bits(model, _all_at(base, width)) for width in widths}
    found = survey(model, base)
    forms = {f"{block.name}.{path}": form for block in found.blocks for path, form in block.formats.items()}
    sizes = {f"{block.name}.{path}": math.prod(block.shape(path)) for block in found.blocks for path in block.formats}
    if not sizes:
        raise ValueError(f"recipe {base.name!r} quantizes no linear of this model")
    total = sum(sizes.values())
    cost = {name: {width: stored[width][name] * size for width in widths} for name, size in sizes.items()}
    least = sum(each[widths[0]] for each in cost.values())
    if least > bits * total:
        raise ValueError(
            f"{bits} bits a weight were asked for; with codes of {widths[0]} bits this recipe takes {least / total:.3f}, everything "
            "stored counted: ask for more, or use larger groups"
        )
    text = calibration_of(found.source, calibration, samples, seq_len)
    curves: dict[str, dict[int, float]] = {}
    before = 0.0
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        journal = Journal(Path(folder) / "allocate", {})
        journal.open()
        walk = Walk(found.source, base, text.ids, journal, ram_limit, progress=report)
        try:
            known = walk.sensitivities()
            for i, block in enumerate(found.blocks):
                f_OI = known.load(i)
                found.source.load_into(walk.model, block.name)
                for path, form in block.formats.items():
                    linear = walk.blocks[i].get_submodule(path)
                    w_OI = stored_as_OI(linear, linear.get_parameter("weight").detach().float())
                    curve = _curve(w_OI, f_OI[path], form.weight, base, {*widths, _width(form.weight)})
                    before += curve[_width(form.weight)]
                    curves[f"{block.name}.{path}"] = {width: curve[width] for width in widths}
                found.source.release(walk.model, block.name)
                report(i + 1, len(found.blocks), f"rounding block {i + 1} at every width")
        finally:
            walk.close()
    chosen = spend(curves, cost, bits * total)
    return Allocation(
        base,
        {name: replace(forms[name], weight=_at(forms[name].weight, width)) for name, width in chosen.items()},
        sum(cost[name][width] for name, width in chosen.items()) / total,
        sum(curves[name][width] for name, width in chosen.items()),
        sum(given[name] * size for name, size in sizes.items()) / total,
        before,
    )


def spend(
    losses: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """The width of each name: the next one goes to who gains most per bit, as long as the budget has room for it.

    Args:
        losses, cost: by name, then by width in rising order; costs rise.
    """
    widths = list(next(iter(losses.values())))
    at = dict.fromkeys(losses, 0)
    left = budget - sum(cost[name][widths[0]] for name in losses)
    while True:
        best, who = 0.0, None
        for name, i in at.items():
            if i + 1 == len(widths):
                continue
            price = cost[name][widths[i + 1]] - cost[name][widths[i]]
            gain = (losses[name][widths[i]] - losses[name][widths[i + 1]]) / price
            if price <= left and gain > best:
                best, who = gain, name
        if who is None:
            return {name: widths[i] for name, i in at.items()}
        left -= cost[who][widths[at[who] + 1]] - cost[who][widths[at[who]]]
        at[who] += 1


def _curve(w_OI: Tensor, f_OI: Tensor, spec: Spec, recipe: Recipe, widths: Iterable[int]) -> dict[int, float]:
    """What the model loses to this linear at each width: half the Fisher-weighed squared error of rounding, by a sample of
    its output channels. A step that rotates spreads error and information evenly, so there both are averaged."""
    rotation = next((step for step in recipe.steps if isinstance(step, Incoherence)), None)
    if rotation is not None:
        w_OI, f_OI = rotation.turned(w_OI), f_OI.mean().expand_as(f_OI)
    picked = torch.linspace(0, len(w_OI) - 1, min(_ROWS, len(w_OI))).long()
    w, f = w_OI[picked], f_OI[picked]
    share = len(w_OI) / len(picked) / 2
    fit = _FIT if isinstance(spec.grid, RangeGrid) else recipe.steps[-1].solver.fit
    return {
        width: share * (f * (quantize(w, _at(spec, width), fit).dequantize() - w).square()).sum().item()
        for width in widths
    }


def _width(spec: Spec) -> int:
    return spec.grid.bits


def _at(spec: Spec, width: int) -> Spec:
    if "bits" not in {field.name for field in fields(spec.grid)}:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"there are no widths to choose from: the recipe has the grid {spec.grid}")
    return replace(spec, grid=replace(spec.grid, bits=width))  # pyright: ignore[reportArgumentType]


def _all_at(base: Recipe, width: int) -> Recipe:
    rules = (
        rule if rule.weight is None else rule.model_copy(update={"weight": _at(rule.weight, width)})
        for rule in base.scheme.rules
    )
    return rebuilt(base, scheme=Scheme(rules=tuple(rules)))


def _bits(model: str | PathLike[str], recipe: Recipe) -> dict[str, float]:
    """Stored bits a weight, by layer."""
    return {layer.name: layer.bits_per_weight for layer in planned_layers(survey(model, recipe))}
