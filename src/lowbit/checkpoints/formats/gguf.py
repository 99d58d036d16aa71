"""GGUF, the format of llama.cpp: one file with config, tokenizer and tensors, written with the package gguf.

Tensors are named, ordered and offset as llama.cpp wants them (:mod:`lowbit.architectures.gguf`); packed weights go into the type
that holds them as they are (:mod:`~lowbit.checkpoints.formats.gguf_types`). config.json and the tokenizer's files are kept in the
file as well, so that a model comes back as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from lowbit.architectures.gguf import gguf_architecture, gguf_names
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import TensorRole, beside_codes, biases
from lowbit.checkpoints.formats.gguf_presets import PRESETS, stand_ins, types_of
from lowbit.checkpoints.formats.gguf_reading import Reading, config_and_files, opened
from lowbit.checkpoints.formats.gguf_tokenizer import tokenizer_values
from lowbit.checkpoints.formats.gguf_types import type_of
from lowbit.checkpoints.formats.gguf_writing import DTYPES, Writing
from lowbit.checkpoints.packed_model import PackedModel, UsualAnswers
from lowbit.checkpoints.shards import ModelError
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.numerics import Spec, nearest

FILE = "model.gguf"


def _shared_and_tied(tensors: Sequence[TensorRole], config: Any) -> tuple[int, bool]:
    """Queries that share a key and value, and whether the embedding is the output head."""
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_attention_heads // keys, all(tensor.role != "head" for tensor in tensors)


@dataclass(frozen=True)
class Gguf(UsualAnswers):
    """Every packed weight in one of GGUF's types; others in floating point.

    Args:
        floats: the type of matrices that are not packed: F32, F16 or BF16; None: that of their own dtype.
        preset: llama.cpp's name of a mix of types, which a recipe then reaches; None: the formats are the recipe's.
    """

    floats: str | None = None
    preset: str | None = None
    name = "gguf"
    title = "llama.cpp GGUF"
    holds_plain = holds_tables = True

    @property
    def says_numbers(self) -> bool:
        return self.preset is not None

    def with_option(self, option: str) -> Gguf:
        """The format with matrices in floating point as f32, f16 or bf16, or with the types of a preset such as q4_k_m."""
        if option.lower() in PRESETS:
            return Gguf(preset=option.lower())
        if option.upper() not in DTYPES:
            known = [*(each.lower() for each in DTYPES), *PRESETS]
            raise ValueError(f"unknown option gguf:{option}{nearest(option, known)}")
        return Gguf(option.upper())

    def specs(self, tensors: Sequence[TensorRole], config: Any) -> Mapping[str, Spec] | None:
        if self.preset is None:
            return None
        types = types_of(self.preset, tensors, *_shared_and_tied(tensors, config))
        return {name: kind.spec for name, kind in types.items()}

    def stand_ins(self, tensors: Sequence[TensorRole], config: Any) -> str | None:
        if self.preset is None:
            return None
        return stand_ins(self.preset, tensors, *_shared_and_tied(tensors, config))

    def why_not(
        self, description: ModelDescription, new_biases: Collection[str] = (), config: Any = None
    ) -> str | None:
        if not description.layers and self.preset is not None:
            return f"nothing is quantized; lowbit quantize MODEL --format gguf:{self.preset} does both"
        problems = list(dict.fromkeys(self._problems(description, new_biases, config)))
        return "; ".join(problems) or None

    def _problems(self, description: ModelDescription, new_biases: Collection[str], config: Any) -> Iterator[str]:
        if config is not None:
            try:
                gguf_architecture(config).metadata(config)
            except ValueError as error:
                yield str(error)
        if description.unfused_experts:
            yield "experts are not written"
        yield from biases(new_biases)
        yield from beside_codes(description, tables=True)
        layers = {(each.spec, each.act, each.shape) for each in description.layers.values()}
        layers |= {(each.spec, each.act, each.shape) for each in description.embeddings.values()}
        for spec, act, shape in sorted(layers, key=str):
            if isinstance(reason := type_of(spec, shape), str):
                yield reason
            if act is not None:
                yield "it does not describe activations: its runtime quantizes them in its own way"

    def why_not_files(self, directory: Path, config: Any) -> str | None:
        try:
            tokenizer_values(directory, config.vocab_size)
        except ValueError as error:
            return str(error)
        return None

    def write(self, model: PackedModel, directory: Path) -> None:
        """Writes ``model.gguf``."""
        Writing(self.floats, None if self.preset is None else self.preset.upper()).write(model, directory / FILE)

    def read_packed(self, file: Path) -> PackedModel | None:
        """As :meth:`read`; None if a file is of no known architecture, or no packed layer holds any of its weights.

        Raises:
            ModelError: not a GGUF file, or a damaged one.
        """
        reader = opened(file)
        architecture = reader.get_field("general.architecture")
        known = architecture is not None and architecture.contents() in gguf_names()
        packed = known and any(tensor.tensor_type.name in BLOCK_TYPES for tensor in reader.tensors)
        return self.model_of(file, reader) if packed else None

    def read(self, directory: Path) -> PackedModel:
        """The model of a GGUF file, or of a directory with one, as a stream; each tensor is read when it is asked for.

        A weight of a type that no packed layer holds comes decoded.

        Raises:
            ModelError: no GGUF file, or one of a model that is not known here.
        """
        file = directory if directory.is_file() else directory / FILE
        return self.model_of(file, opened(file))

    def model_of(self, file: Path, reader: GGUFReader) -> PackedModel:
        """As :meth:`read`, of a file that is open."""
        config, kept = config_and_files(file, reader)
        try:
            entry = gguf_architecture(config)
        except ValueError as error:
            raise ModelError(f"{file}: {error}") from error
        return Reading(file, reader, config, entry).model(kept)
