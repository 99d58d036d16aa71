"""A packed model as a stream: its description, and its tensors one layer at a time.

Formats read a model as this and write it from this, so that none of them has to hold a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import LinearDescription


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A packed linear or embedding and its tensors by buffer name, laid out as ``description.layout()`` says."""

    name: str
    description: LinearDescription
    tensors: Mapping[str, Tensor]

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in the whole model."""
        return {f"{self.name}.{buffer}": tensor for buffer, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class PlainTensor:
    """A tensor that no packed module holds: of a norm, a linear that is not quantized."""

    name: str
    tensor: Tensor

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensor under its name."""
        return {self.name: self.tensor}


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A packed model to be read once, from its first part to its last.

    Attributes:
        description: what is quantized, and how.
        config: the content of config.json without ``quantization_config``.
        parts: opens the stream. Each part is read when it is asked for and not kept.
        files: everything else that belongs to the model: files and folders of the tokenizer, the generation config, cards.
    """

    description: ModelDescription
    config: Mapping[str, Any]
    parts: Callable[[], Iterator[PackedLayer | PlainTensor]]
    files: tuple[Path, ...] = ()


def parts_of(
    description: ModelDescription, names: list[str], read: Callable[[str], Tensor]
) -> Iterator[PackedLayer | PlainTensor]:
    """The parts of a model whose tensors are ``names``, in that order; a layer comes where its first tensor does.

    Args:
        read: the tensor of a name; called once for each.
    """
    described = {**description.layers, **description.embeddings}
    buffers: dict[str, list[str]] = {}
    for name in names:
        layer, _, buffer = name.rpartition(".")
        if layer in described:
            buffers.setdefault(layer, []).append(buffer)
    for name in names:
        layer = name.rpartition(".")[0]
        if layer not in described:
            yield PlainTensor(name, read(name))
        elif layer in buffers:
            tensors = {buffer: read(f"{layer}.{buffer}") for buffer in buffers.pop(layer)}
            yield PackedLayer(layer, described[layer], tensors)


class UsualAnswers:
    """What most file formats answer: they have no options, and there are no files that they cannot hold."""

    name: ClassVar[str]
    title: ClassVar[str]
    holds_plain = False
    holds_tables = False
    turns_residual = False
    says_numbers = False

    def with_option(self, option: str) -> Any:
        raise ValueError(f"format {self.name} has no options, found {self.name}:{option}")

    def specs(self, tensors: Any, config: Any) -> Any:
        return None

    def stand_ins(self, tensors: Any, config: Any) -> str | None:
        return None

    def why_not_files(self, directory: Path, config: Any) -> str | None:
        return None

    def note(self, description: ModelDescription) -> str | None:
        return None
