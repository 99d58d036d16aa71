"""Rotations: learns how channels are rotated before a model is quantized, by the loss of the model as it will be quantized.

Rotations leave the network's function as it is, but which rotation it is decides what rounding costs. Two kinds are learned: one of
the residual stream, and one of the values of each block's heads. They are folded into the original weights in every forward
pass, by the folds that the stage Blockwise uses afterwards; inputs that no fold reaches are rotated by Hadamard matrices at
run time, as there. Weights stay as they are in the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import ResolvedEdge, fold, rotate_residual
from lowbit.modules import DraftLinear, SharedInput, make_drafts, turning
from lowbit.numerics import serializable
from lowbit.steps import drawn_heads, drawn_input, drawn_residual, folded_heads, rotated_at_run_time
from lowbit.training.recompute import replaced
from lowbit.training.trainable import Group, OriginalBlock, Start, Trainable
from lowbit.transforms import Rotate


@dataclass(frozen=True, eq=False)
class LearnedRotations:
    """What was learned.

    Attributes:
        residual: the rotation of the residual stream, ``[d, d]`` float32; None: it is not rotated.
        heads: by the name of a block, then of an edge, the rotation ``[D, D]`` float32 of each head of D channels.
    """

    residual: Tensor | None = None
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors, from which :meth:`of` makes this again."""
        named = {f"{block}|{edge}": q_DD for block, edges in self.heads.items() for edge, q_DD in edges.items()}
        return named if self.residual is None else {"residual": self.residual, **named}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LearnedRotations:
        heads: dict[str, dict[str, Tensor]] = {}
        for name, q_DD in tensors.items():
            block, bar, edge = name.partition("|")
            if bar:
                heads.setdefault(block, {})[edge] = q_DD
        return cls(tensors.get("residual"), heads)

    def of_block(self, name: str) -> dict[str, Rotate]:
        """Those of the heads of a block, by edge."""
        return {edge: Rotate(q_DD.double()) for edge, q_DD in self.heads.get(name, {}).items()}


@serializable
@dataclass(frozen=True)
class Rotations(Trainable):
    """The rotations of the residual stream and of the heads' values (R1 and R2 of SpinQuant, arXiv:2405.16406, section 3).

    Inputs, and with the stage's ``cache`` keys and values, are quantized as the scheme says. Where the residual stream cannot be
    rotated, the rotations of heads are learned alone.

    Args:
        rounds_weights: weights are rounded too, to the nearest level between their extremes; False, as the authors do before GPTQ:
            they are as they are.
    """

    rounds_weights: bool = False

    @property
    def needs_packed(self) -> bool:
        return False

    @property
    def finds_rotations(self) -> bool:
        return True

    @property
    def floats_per_weight(self) -> int:
        return 4  # the original, and in the graph the weight with one rotation, with two, and rounded

    def parameters(self, model: nn.Module, start: Start) -> RotatedModel:
        return RotatedModel(model, start, self.rounds_weights)


class RotatedModel:
    """An original model that computes with rotations, which are the leaves. See ``Parameters``.

    Leaves are float64, so that they stay orthogonal; the model computes with them in float32.

    Attributes:
        residual: the leaf ``[d, d]``, or None.
    """

    def __init__(self, model: nn.Module, start: Start, rounds_weights: bool):
        config: Any = model.config
        self.notes = sorted(
            {f"the residual stream is not rotated: {why}" for b in start.blocks if (why := b.resolved.residual.fixed)}
        )
        self.residual: nn.Parameter | None = None
        if not self.notes:
            width = config.get_text_config().hidden_size
            drawn = drawn_residual(width, start.seed)
            self.residual = nn.Parameter(drawn.forward(torch.eye(width, dtype=torch.float64)))
        self.blocks = [_Block(model, each, self.residual, rounds_weights) for each in start.blocks]
        leaves = [leaf for block in self.blocks for leaf in block.leaves.values()]
        self.groups = [Group([*([] if self.residual is None else [self.residual]), *leaves])]
        self._open = ExitStack()

    def __enter__(self) -> RotatedModel:
        for each in self.blocks:
            self._open.enter_context(each)
        if self.residual is not None:
            first, last = self.blocks[0].module, self.blocks[-1].module
            self._open.enter_context(turning(first, last, lambda: Rotate(self.residual)))  # pyright: ignore[reportArgumentType]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def replaced(self) -> dict[str, Tensor]:
        return {}

    def commit(self) -> None:
        """Nothing of the model is stored: :meth:`learned` is."""

    def learned(self) -> LearnedRotations:
        """The rotations as they are now."""
        residual = None if self.residual is None else self.residual.detach().float()
        heads = {b.name: {name: q.detach().float() for name, q in b.leaves.items()} for b in self.blocks if b.leaves}
        return LearnedRotations(residual, heads)


class _Block:
    """A block that folds rotations into its weights whenever it runs.

    Attributes:
        leaves: the rotation ``[D, D]`` of the heads at each edge that carries it, by name.
    """

    def __init__(self, model: nn.Module, original: OriginalBlock, residual: nn.Parameter | None, rounds_weights: bool):
        self.name, self.resolved, self.residual = original.name, original.resolved, residual
        self.module, self._exact = model.get_submodule(original.name), not rounds_weights
        self._device = next(self.module.parameters()).device.type
        make_drafts(self.module, original.resolved.linears)
        self.drafts = {path: self._draft(path) for path in original.formats}
        for path, form in original.formats.items():
            self.drafts[path].format = form
        self.edges = folded_heads(self.resolved, self.drafts)
        self.leaves = {edge.name: nn.Parameter(drawn_heads(edge, original.seed).q) for edge in self.edges}
        self._rotate_at_run_time(self.edges, original.seed)

    def _draft(self, path: str) -> DraftLinear:
        draft = self.module.get_submodule(path)
        assert isinstance(draft, DraftLinear), path
        return draft

    def _rotate_at_run_time(self, folded: Sequence[ResolvedEdge], seed: int) -> None:
        rotated = rotated_at_run_time(self.resolved, self.drafts, self.residual is not None, folded)
        for name, readers in rotated:
            for path in readers:
                width = self.drafts[path].weight.shape[1]
                self.drafts[path].transform(drawn_input(name, width, seed))

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters that rotations change, by name."""
        own: dict[str, Tensor] = dict(self.module.named_parameters())
        changed: dict[str, Tensor] = {}
        if self.residual is not None:
            changed = rotate_residual(self.resolved.residual, Rotate(self.residual.float()), own, torch.float32)
        for edge in self.edges:
            changed |= fold(edge, Rotate(self.leaves[edge.name].float()), {**own, **changed})
        return changed

    def __enter__(self) -> _Block:
        self._run = self.module.forward
        self.module.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        del self.module.__dict__["forward"]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block as it runs quantized. Weights are folded here, so that a block that runs again in the backward pass keeps none."""
        with torch.autocast(self._device, enabled=False):  # as exact as they are stored
            weights = self.weights()
        inputs = SharedInput()
        with ExitStack() as simulating:
            for path, draft in self.drafts.items():
                weight, bias = (weights.pop(f"{path}.{leaf}", getattr(draft, leaf)) for leaf in ("weight", "bias"))
                chosen = {"weight": weight, "bias": bias, "exact": self._exact, "inputs": inputs}
                simulating.enter_context(draft.simulated(**chosen))
            simulating.enter_context(replaced(self.module, weights))
            return self._run(*args, **kwargs)
