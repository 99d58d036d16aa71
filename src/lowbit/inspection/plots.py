"""The three figures of an inspection. They do not use pyplot, so they touch no display and no global state.

Shapes: B block, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lowbit.inspection.rows import MASSIVE, OUTLIER, InputRow, Inspection

_BINS = 512  # columns of a heat map; more channels are pooled by maximum, so a lone outlier stays visible
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
"""Of series that must be told apart, also by people who do not see all colours (Okabe and Ito)."""


def plain(text: str) -> str:
    """``text`` for matplotlib, which would read what is between dollars as a formula."""
    return text.replace("$", r"\$")


def draw_channels(inspection: Inspection, channels: Mapping[str, Tensor]) -> Figure:
    """A heat map for each role of input: channel maxima over the median channel's, blocks down, channels across."""
    roles = _roles(inspection)
    rows = -(-len(roles) // 2)
    figure = Figure(figsize=(13, 1.2 + 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, min(2, len(roles)), squeeze=False).flatten()
    maps = {role: _ratios([row for row in inspection.inputs if row.role == role], channels) for role in roles}
    top = max([2 * OUTLIER, *(ratio_BC.nan_to_num(0).max().item() for ratio_BC in maps.values())])
    image = None
    for axes, role in zip(grid, roles, strict=False):
        ratio_BC = maps[role]
        wide = max(row.channels for row in inspection.inputs if row.role == role)
        image = axes.imshow(
            ratio_BC.clamp(min=0.1).numpy(),
            aspect="auto",
            norm=LogNorm(0.1, top),
            cmap="inferno",
            interpolation="nearest",
            extent=(0, wide, len(ratio_BC) - 0.5, -0.5),
        )
        axes.set(title=f"{plain(role)} ({wide} channels)", xlabel="channel", ylabel="block")
        _mark_outliers(axes, [row for row in inspection.inputs if row.role == role], wide)
    for axes in grid[len(roles) :]:
        axes.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=list(grid), label="largest magnitude / that of the median channel", shrink=0.9)
    figure.suptitle(
        f"{plain(inspection.model)}: largest magnitude of each channel (an outlier: over {OUTLIER:g} times the median)"
    )
    return figure


def _mark_outliers(axes: Any, inputs: list[InputRow], wide: int, count: int = 4) -> None:
    """Marks the largest outliers, a pixel or two in the map, with a circle and a number where there is room."""
    places = sorted(((ratio, channel, row.block) for row in inputs for channel, ratio in row.outliers), reverse=True)
    high, marked = 1 + max(row.block for row in inputs), []
    for ratio, channel, block in places:
        near = any((abs(channel - c) < 0.25 * wide and abs(block - b) < 0.08 * high) or channel == c for c, b in marked)
        if near or len(marked) == count:
            continue
        marked.append((channel, block))
        left = channel > 0.8 * wide
        axes.plot(channel + 0.5, block, "o", color="white", fillstyle="none", markersize=8)
        axes.annotate(
            f"{channel}: {ratio:.0f}x",
            (channel + 0.5, block),
            xytext=(-8 if left else 8, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top" if block < 0.08 * high else "bottom" if block > 0.92 * high else "center",
            color="white",
            fontsize=8,
        )


def _roles(inspection: Inspection) -> list[str]:
    return list(dict.fromkeys(row.role for row in inspection.inputs))


def _ratios(inputs: list[InputRow], channels: Mapping[str, Tensor]) -> Tensor:
    """Each channel's maximum over the median channel's, ``[B, bins]``; NaN for blocks without such an input."""
    bins = min(_BINS, max(row.channels for row in inputs))
    ratio_BC = torch.full((1 + max(row.block for row in inputs), bins), torch.nan)
    for row in inputs:  # several of one block are experts: the largest counts
        ratio_C = channels[row.name] / max(row.median_channel, 1e-30)
        pooled = torch.nn.functional.adaptive_max_pool1d(ratio_C[None, None], min(bins, len(ratio_C)))[0, 0]
        ratio_BC[row.block, : len(pooled)] = torch.fmax(ratio_BC[row.block, : len(pooled)], pooled)
    return ratio_BC


def draw_tokens(inspection: Inspection, channels: Mapping[str, Tensor]) -> Figure:
    """The largest and the median token over blocks for each role of input; massive tokens are marked and named."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for role, colour in zip(_roles(inspection), COLOURS * 99, strict=False):
        inputs = _one_a_block([row for row in inspection.inputs if row.role == role])
        blocks = [row.block for row in inputs]
        axes.plot(blocks, [row.largest for row in inputs], color=colour, marker=".", label=plain(role))
        axes.plot(blocks, [row.median_token for row in inputs], color=colour, linestyle=":")
        marked = [row for row in inputs if row.massive]
        axes.plot(
            [row.block for row in marked],
            [row.largest for row in marked],
            "o",
            color=colour,
            markersize=10,
            fillstyle="none",
        )
    massive = [(row, row.massive[0]) for row in inspection.inputs if row.massive]
    for row, token in sorted(massive, key=lambda pair: -pair[1].magnitude)[:6]:
        where = "" if token.position is None else f" at position {token.position}"
        right = row.block > 0.85 * max(each.block for each in inspection.inputs)
        axes.annotate(
            f"{token.magnitude:.0f}{where}",
            (row.block, row.largest),
            xytext=(-9 if right else 9, 4),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
        )
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set(
        xlabel="block",
        ylabel="largest magnitude of a token",
        title=f"{plain(inspection.model)}: the largest token (solid) and the median token (dotted);\n"
        f"circles: massive, over {MASSIVE:g} times the median",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _one_a_block(inputs: list[InputRow]) -> list[InputRow]:
    """The row with the largest magnitude in each block: of experts, the worst."""
    worst: dict[int, InputRow] = {}
    for row in inputs:
        if row.block not in worst or row.largest > worst[row.block].largest:
            worst[row.block] = row
    return [worst[block] for block in sorted(worst)]


def draw_layers(inspection: Inspection, channels: Mapping[str, Tensor]) -> Figure:
    """Above: each role's error over blocks (of experts, the worst). Below: the 20 layers with the largest error."""
    hardest = inspection.hardest[:20]
    roles = list(dict.fromkeys(row.role for row in inspection.rows))
    colour = dict(zip(roles, COLOURS * 99, strict=False))
    figure = Figure(figsize=(11, 5.5 + 0.26 * len(hardest)), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(4.2, 1 + 0.26 * len(hardest)))
    block_of = {row.name: row.block for row in inspection.inputs}
    for role in roles:
        worst: dict[int, float] = {}
        for row in inspection.rows:
            if row.role == role and row.error is not None:
                worst[block_of[row.input]] = max(row.error, worst.get(block_of[row.input], 0.0))
        above.plot(list(worst), list(worst.values()), color=colour[role], marker=".", label=plain(role))
    above.set_yscale("log")
    above.set(xlabel="block", ylabel="relative squared output error", title="every layer, by role")
    above.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    for place, row in enumerate(hardest):
        below.barh(place, row.error or 0.0, color=colour[row.role])
    below.set_yticks(range(len(hardest)), [plain(row.name) for row in hardest], fontsize=8)
    below.invert_yaxis()
    below.margins(y=0.01)
    below.set(xlabel="relative squared output error", title="the hardest layers")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{plain(inspection.model)}: output error when rounded to nearest, 4 bits, groups of 64")
    return figure


DRAWINGS: dict[str, Callable[[Inspection, Mapping[str, Tensor]], Figure]] = {
    "channel_maxima.png": draw_channels,
    "massive_tokens.png": draw_tokens,
    "hardest_layers.png": draw_layers,
}


def drawings(inspection: Inspection) -> dict[str, Callable[[Inspection, Mapping[str, Tensor]], Figure]]:
    """Those of :data:`DRAWINGS` that have something to show: layers only where some have an error."""
    return {name: draw for name, draw in DRAWINGS.items() if draw is not draw_layers or inspection.hardest}
