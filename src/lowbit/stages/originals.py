"""Original blocks, loaded when they are asked for: their linears drafts, in the basis of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.architectures import block_modules, rotate_residual
from lowbit.modules import hold_residual, make_drafts
from lowbit.numerics import narrowed
from lowbit.plan.model_plan import ModelPlan
from lowbit.transforms import Rotate, Seeded


@dataclass
class Originals:
    """The blocks of ``model``, a skeleton.

    Args:
        plan: says what they are.
        model: their weights are there from :meth:`load` on, until the caller puts something else in a block's place.
    """

    plan: ModelPlan
    model: PreTrainedModel
    _loaded: set[int] = field(default_factory=set)

    def __post_init__(self):
        self.blocks = block_modules(self.model, self.plan.architecture)

    def load(self, i: int, rotation: Seeded | Rotate | None) -> nn.Module:
        """Block i with its original weights, its linears drafts, in the basis of the stream; at once if it is loaded already.

        ``rotation`` is that of the residual stream; one that no seed makes is kept with the first block.
        """
        if i not in self._loaded:
            self.plan.source.load_into(self.model, self.plan.blocks[i].name)
            make_drafts(self.blocks[i], self.plan.blocks[i].resolved.linears)
            if rotation is not None:
                self._fold(i, rotation)
            if not i and isinstance(rotation, Rotate):
                hold_residual(self.blocks[i], rotation.size).get_buffer("rotation").copy_(rotation.q)
            self._loaded.add(i)
        return self.blocks[i]

    @torch.no_grad()
    def narrow(self, i: int) -> None:
        """Rounds what stays unquantized as it will be stored, so that steps and streams see it."""
        plan, kept = self.plan.blocks[i], self.plan.kept
        packed = {f"{path}.weight" for path in plan.formats}
        state = self.blocks[i].state_dict() if kept.narrows else {}
        for key, value in state.items():
            if key not in packed and value.is_floating_point():
                value.copy_(narrowed(f"{plan.name}.{key}", value, kept.dtype_of(f"{plan.name}.{key}")))

    def _fold(self, i: int, rotation: Seeded | Rotate) -> None:
        """Rotates the residual stream of block i. What stays unquantized is rounded to the dtype that it had."""
        plan = self.plan.blocks[i]
        packed = {f"{path}.weight" for path in plan.formats}
        parameters = dict(self.blocks[i].named_parameters())
        with torch.no_grad():
            for key, value in rotate_residual(plan.resolved.residual, rotation, parameters).items():
                stored = self.plan.source.dtype_of(f"{plan.name}.{key}")
                parameters[key].copy_(value if key in packed else value.to(stored))
