"""What training changes: which parameters of a model, how the model computes with them, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn

from lowbit.architectures import ResolvedBlock
from lowbit.caches import CacheGradients
from lowbit.modules import LinearFormat
from lowbit.numerics import Spec


@dataclass(frozen=True, eq=False)
class Group:
    """Leaves that share a learning rate.

    Attributes:
        leaves: the tensors that the optimizer moves.
        rate: their multiple of the stage's learning rate.
    """

    leaves: list[nn.Parameter]
    rate: float = 1.0


@dataclass(frozen=True, eq=False)
class OriginalBlock:
    """A block of the original model, as the stage Blockwise will quantize it.

    Attributes:
        name: its path in the model.
        resolved: the architecture's table on it.
        formats: of the linears to be quantized, by path in the block.
        seed: of what Blockwise draws in it.
    """

    name: str
    resolved: ResolvedBlock
    formats: Mapping[str, LinearFormat]
    seed: int


@dataclass(frozen=True, eq=False)
class Start:
    """What training is given besides the model.

    Attributes:
        latents: of packed linears by name, the weight ``[O, I]`` float32 that was rounded to their codes; empty where the
            choice of parameters does not ask for them.
        dtypes: of parameters by name, the dtype in which the checkpoint stores them; those left out are stored as they are.
        blocks: all blocks in order, where the original model is trained; empty where a packed one is.
        seed: of the recipe.
    """

    latents: Mapping[str, Tensor] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    blocks: Sequence[OriginalBlock] = ()
    seed: int = 0


class Parameters(Protocol):
    """The parameters of one model in training. While the context is open, the model computes with them.

    Attributes:
        groups: the leaves, by learning rate.
        notes: notes for the report, such as what was left out and why.
    """

    groups: list[Group]
    notes: list[str]

    def __enter__(self) -> Parameters: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def replaced(self) -> dict[str, Tensor]:
        """Values that the next forward must use in place of the model's own parameters and buffers, by name; part of the graph."""
        ...

    def commit(self) -> None:
        """Writes the trained values into the model, rounded as they are stored."""
        ...


class Trainable:
    """A choice of parameters. Subclasses are frozen dataclasses; they define :meth:`parameters` and declare what applies.

    The declarations here are those of numbers that a packed model stores beside its codes.
    """

    @property
    def needs_packed(self) -> bool:
        """Whether the model must be packed already."""
        return True

    @property
    def needs_latents(self) -> bool:
        """Whether it starts from the weights that were rounded to codes, which the stage before then leaves in files."""
        return False

    @property
    def finds_rotations(self) -> bool:
        """Whether it learns rotations for the stage Blockwise, and changes nothing else."""
        return False

    @property
    def needs_adapters(self) -> bool:
        """Whether it moves low-rank terms, which a step of a stage before must have left beside the codes."""
        return False

    @property
    def floats_per_weight(self) -> int:
        """Numbers of 4 bytes that training holds for each packed weight at most, for the estimate of memory."""
        return 0

    @property
    def cache_gradients(self) -> CacheGradients:
        """Which gradients keys and values have, where the model trains with a quantized cache."""
        return CacheGradients()

    def check(self, weights: Sequence[Spec]) -> None:
        """Raises ValueError if it cannot train weights in one of these formats."""

    def parameters(self, model: nn.Module, start: Start) -> Parameters:
        """The chosen parameters of ``model``.

        ``model`` is a transformers causal language model in float32 without gradients of its own.
        """
        raise NotImplementedError
