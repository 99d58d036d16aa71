"""One linear by itself: for researchers, and for comparing a method with its authors' code on the same matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import Kind, Port, ResolvedBlock, ResolvedEdge, ResolvedInput
from lowbit.modules import QuantLinear
from lowbit.recipes import Blockwise, Recipe, as_recipe
from lowbit.steps import BlockIO, BlockState
from lowbit.surroundings import own_settings, usable

_PATH = "linear"


class LoneLinear(nn.Module):
    """A block of one linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@own_settings()
def quantize_linear(
    linear: nn.Linear,
    inputs: Tensor | None,
    recipe: Recipe | str | Path | Mapping[str, Any],
    fisher: Tensor | None = None,
) -> QuantLinear:
    """Quantizes one linear layer by a recipe.

    No layer before it can absorb a transform of its input, so the result applies transforms itself, at run time; they
    count in its bits. ``q(x)``, ``q.dequantize()`` (the stored weight, which reads the transformed input),
    ``q.effective_weight()`` and ``q.bits_per_weight`` are there to look at.

    Args:
        linear: ``[out_features, in_features]``; not changed.
        inputs: ``[tokens, in_features]`` or ``[windows, tokens, in_features]``, or None for recipes that need none.
        recipe: as for :func:`lowbit.quantize`; the rule for ``*`` counts.
        fisher: ``[out_features, in_features]`` Fisher information of the weight (sums of squared gradients; the scale does not
            matter), for recipes that need it, and for no others.

    Raises:
        ValueError: inputs of another width, NaN or Inf, a recipe that does not quantize a lone linear.
    """
    recipe = as_recipe(recipe)
    if any(not isinstance(stage, Blockwise) for stage in recipe.stages):
        raise ValueError(
            f"recipe {recipe.name!r} trains a whole model, and a lone linear is in none; quantize the model"
        )
    _check_linear(linear)
    _check_fisher(linear, recipe, fisher)
    if inputs is not None:
        _check_inputs(linear, inputs)
    elif recipe.reads_inputs:
        raise ValueError(f"recipe {recipe.name!r} calibrates on inputs; pass a tensor [tokens, {linear.in_features}]")
    form = recipe.scheme.format(_PATH, _PATH)
    if form is None:
        raise ValueError(f"recipe {recipe.name!r} leaves a linear without a role as it is; add a rule that matches '*'")
    block = LoneLinear(_copy(linear))
    io = None
    if inputs is not None:
        x = usable(inputs).float().reshape(-1, *inputs.shape[-2:])
        with torch.no_grad():
            y = torch.cat([block(window[None]) for window in x])
        io = BlockIO(x, y, lambda run, window: run(window))
    known = {} if fisher is None else {_PATH: usable(fisher).float()}
    state = BlockState.of("", block, lone_block(linear), {_PATH: form}, io, known, seed=recipe.seed)
    for step in recipe.steps:
        step.run(state)
    return block.linear  # pyright: ignore[reportReturnType]


def _check_linear(linear: Any) -> None:
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"expected a torch.nn.Linear, found a {type(linear).__name__}; wrap a bare weight [out, in] in one"
        )


def _check_inputs(linear: nn.Linear, inputs: Any) -> None:
    wide = linear.in_features
    found = list(inputs.shape) if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
    if not isinstance(inputs, Tensor) or inputs.dim() not in (2, 3) or inputs.shape[-1] != wide or not inputs.numel():
        raise ValueError(
            f"inputs are a tensor [tokens, {wide}] or [windows, tokens, {wide}] with a token at least, found {found}"
        )
    if not torch.isfinite(inputs).all():
        raise ValueError("the inputs hold NaN or Inf")


def _check_fisher(linear: nn.Linear, recipe: Recipe, fisher: Tensor | None) -> None:
    shape = [linear.out_features, linear.in_features]
    if fisher is None:
        if recipe.needs_fisher:
            raise ValueError(
                f"recipe {recipe.name!r} needs Fisher information; pass fisher={shape}, the squared gradients of the loss by "
                "this weight, summed over calibration windows (ones, to treat all weights alike)"
            )
        return
    if not recipe.needs_fisher:
        raise ValueError(f"recipe {recipe.name!r} has no use for Fisher information; leave fisher out")
    if list(fisher.shape) != shape:
        raise ValueError(f"fisher is {shape} as the weight, found {list(fisher.shape)}")
    if not (torch.isfinite(fisher).all() and (fisher >= 0).all()):
        raise ValueError("fisher holds NaN, Inf or negative values; squared gradients are none of these")


def _copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.load_state_dict({name: value.detach().float() for name, value in linear.state_dict().items()})
    return copy.requires_grad_(False)


def lone_block(linear: nn.Linear) -> ResolvedBlock:
    """One input, read by one linear, and one edge without a producer, named as an edge behind a norm is."""
    port = Port(module=_PATH, side="in", has_bias=linear.bias is not None)
    edge = ResolvedEdge(
        name="norm_input",
        channels=linear.in_features,
        carries=frozenset({Kind.SCALE, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE}),
        ports=(port,),
        within=None,
        positive=False,
        judge=_PATH,
        inputs=("input",),
    )
    return ResolvedBlock({_PATH: _PATH}, (ResolvedInput("input", (_PATH,)),), ((_PATH,),), (edge,), {})
