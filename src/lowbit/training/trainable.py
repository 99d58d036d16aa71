"""What training changes: which parameters of a model, how the model computes with them, and how they are stored."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class Parameters(Protocol):
    """The parameters of one model in training. While the context is open, the model computes with them.

    Attributes:
        leaves: the tensors that the optimizer moves.
        notes: notes for the report, such as what was left out and why.
    """

    leaves: list[nn.Parameter]
    notes: list[str]

    def __enter__(self) -> Parameters: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def replaced(self) -> dict[str, Tensor]:
        """Values that the next forward must use in place of the model's own parameters, by name; part of the graph."""
        ...

    def commit(self) -> None:
        """Writes the trained values into the model, rounded as they are stored."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A choice of parameters, as a frozen value."""

    @property
    def needs_packed(self) -> bool:
        """Whether the model must be packed already."""
        ...

    def parameters(self, model: nn.Module) -> Parameters:
        """The chosen parameters of ``model``.

        ``model`` is a transformers causal language model in float32 without gradients of its own.
        """
        ...
