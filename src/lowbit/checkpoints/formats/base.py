"""A file format: what it cannot hold, and how models are written and read in it.

:func:`lowbit.plan` prints what :meth:`FileFormat.why_not` answers, and :func:`lowbit.export` refuses by it, so that the
two cannot disagree. The answer follows from the description of the model alone: a recipe's is foreseen, a checkpoint's
is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.packed_model import PackedModel, UsualAnswers
from lowbit.checkpoints.shards import ModelError
from lowbit.modules import ActSpec, LinearDescription
from lowbit.numerics import Int, PerChannel, PerGroup, Spec


@dataclass(frozen=True)
class TensorRole:
    """A matrix of a model, before anything is quantized.

    Args:
        name: of its module.
        role: in its block, or ``embedding`` or ``head``.
        block: number of its block; 0 outside of blocks.
        columns: inputs.
    """

    name: str
    role: str
    block: int
    columns: int


class FileFormat(Protocol):
    """One file format. A new one is a class in a file of this package and a line in ``FORMATS``.

    Attributes:
        name: what ``lowbit export --format`` calls it.
        title: what tables call it.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def holds_plain(self) -> bool:
        """Whether it also holds models of which nothing is quantized."""
        ...

    @property
    def holds_tables(self) -> bool:
        """Whether it holds packed embeddings."""
        ...

    @property
    def turns_residual(self) -> bool:
        """Whether its readers turn the residual stream when the model runs; else a rotation is folded into embedding and head."""
        ...

    @property
    def says_numbers(self) -> bool:
        """Whether its option gives every matrix a number format, in place of a recipe's."""
        ...

    def with_option(self, option: str) -> FileFormat:
        """The format as ``NAME:option`` asks for it. Raises ValueError for one that it does not have."""
        ...

    def specs(self, tensors: Sequence[TensorRole], config: Any) -> Mapping[str, Spec] | None:
        """The formats that an option of this format gives to matrices, by name; others stay as they are. None: a recipe's own.

        Args:
            tensors: linears of blocks, the embedding and the head, with the head's weight only where it has one.
            config: the model's transformers config.
        """
        ...

    def stand_ins(self, tensors: Sequence[TensorRole], config: Any) -> str | None:
        """A sentence on the matrices that :meth:`specs` gives other formats than the option names, which do not fit their rows; None:
        there are none."""
        ...

    def why_not(
        self, description: ModelDescription, new_biases: Collection[str] = (), config: Any = None
    ) -> str | None:
        """The reason why the format cannot hold a model, or None where it can.

        Args:
            description: what the model's packed layers store.
            new_biases: names of the linears that have a bias though the model's class gives them none.
            config: the model's transformers config; None: of no model in particular.
        """
        ...

    def why_not_files(self, directory: Path, config: Any) -> str | None:
        """The reason why the format cannot hold what belongs to a model, such as its tokenizer, or None where it can.

        Args:
            directory: with the files.
            config: the model's transformers config.
        """
        ...

    def note(self, description: ModelDescription) -> str | None:
        """What whoever loads the written model should know, such as readers that need an option; None: nothing."""
        ...

    def write(self, model: PackedModel, directory: Path) -> None:
        """Writes ``model``, for which :meth:`why_not` is None, into the empty ``directory``.

        It reads the parts of ``model`` in order, from the first to the last (a format that lists them at its beginning, twice),
        and holds one file at most.
        """
        ...

    def read(self, directory: Path) -> PackedModel:
        """A model in this format. Raises ModelError where ``directory`` holds none."""
        ...


class Unreadable(ModelError):
    """A directory in a known format, with contents that lowbit does not read; the format's own package may."""


class WithProblems(UsualAnswers, ABC):
    """A format that says what it cannot hold one problem after another."""

    def why_not(
        self, description: ModelDescription, new_biases: Collection[str] = (), config: Any = None
    ) -> str | None:
        if not description.layers:
            return "no linear is quantized"
        return "; ".join(dict.fromkeys(self.problems(description, new_biases))) or None

    @abstractmethod
    def problems(self, description: ModelDescription, new_biases: Collection[str]) -> Iterator[str]:
        """What of the model the format cannot hold, one sentence each; the same may come again."""

    def unreadable(self, directory: Path, found: str) -> Unreadable:
        """The error for a directory that this format's package may read and lowbit does not."""
        return Unreadable(f"{directory}: {found}, which lowbit does not read as {self.title}")


# What several formats have in common


def beside_codes(
    description: ModelDescription, *, order: bool = False, tables: bool = False, cache: bool = False
) -> Iterator[str]:
    """What a model does or stores that formats of plain linears have no place for.

    Args:
        order: a format for which one column order of each linear is no problem.
        tables: a format that holds packed embeddings.
        cache: a format that says itself which caches it has a place for.
    """
    kept = parts_in_words(description.layers.values(), order=order)
    if kept:
        online = any(each.startswith("rotations") for each in kept)
        avoided = "; a recipe with RotateResidual and no other rotation folds all of them" if online else ""
        yield f"layers keep {' and '.join(sorted(kept))}, for which it has no place{avoided}"
    if description.embeddings and not tables:
        yield "the embedding is packed, for which it has no place; --embedding-bits 16 leaves it as it is"
    if description.attention:
        yield "attention multiplies quantized queries, keys and values, for which it has no place"
    if description.cache and not cache:
        yield "the cache is quantized, for which it has no place"
    if description.residual is not None:
        yield (
            "the residual stream is rotated when the model runs, for which it has no place; --embedding-bits 16 --head-bits 16 "
            "lets the rotation be folded into embedding and head"
        )


def parts_in_words(layers: Iterable[LinearDescription], *, order: bool = False) -> list[str]:
    """What ``layers`` do to their inputs and outputs and store beside their codes, each once; without a last column order of
    the input where ``order``."""
    kept: dict[str, None] = {}
    for layer in dict.fromkeys(layers):
        pre = layer.pre[:-1] if order and layer.pre and layer.pre[-1].type == "Permute" else layer.pre
        kept |= dict.fromkeys(f"{_WORDS.get(part.type, part.type)} of inputs" for part in pre)
        kept |= dict.fromkeys(f"{_WORDS.get(part.type, part.type)} of outputs" for part in layer.post)
        kept |= dict.fromkeys(_WORDS.get(part.type, part.type) for part in layer.side_terms)
    return list(kept)


_WORDS = {
    "Scale": "scales",
    "Shift": "shifts",
    "Permute": "column orders",
    "Rotate": "rotations",
    "Kronecker": "rotations",
    "RandomHadamard": "rotations",
    "Normalize": "normalizations",
    "Split": "copies",
    "Merge": "means",
    "Reassembly": "copies and means",
    "Sparse": "outliers in half precision",
    "KeptColumns": "outliers in half precision",
    "LowRank": "low-rank corrections",
}


def biases(new_biases: Collection[str]) -> Iterator[str]:
    """The problem of formats whose readers take the biases from the model's class."""
    if new_biases:
        yield "layers have biases that the model's class does not have"


def shapes(description: ModelDescription) -> list[tuple[Spec, ActSpec | None, tuple[int, int]]]:
    """The distinct pairs of format and matrix size, in an order that the names of layers do not change."""
    layers: Collection[LinearDescription] = description.layers.values()
    return sorted({(layer.spec, layer.act, layer.shape) for layer in layers}, key=str)


def integers(spec: Spec, bits: tuple[int, ...]) -> str:
    """Why weights in ``spec`` are no integers of one of these widths with plain scales, or ""."""
    grid = spec.grid
    if not isinstance(grid, Int) or grid.real_zero or spec.stats is not None:
        return "its weights are integers with integer zero points and plain scales"
    if grid.bits not in bits:
        return f"it has weights of {', '.join(map(str, bits))} bits, not of {grid.bits}"
    return ""


def group_size(spec: Spec, inputs: int) -> int | None:
    """The run of one row that shares a scale; None where scales are not shared so."""
    granularity = spec.granularity
    if isinstance(granularity, PerGroup):
        return granularity.size
    return inputs if isinstance(granularity, PerChannel) else None
