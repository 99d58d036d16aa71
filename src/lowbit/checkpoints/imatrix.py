"""Importance matrices of llama.cpp: the summed squares of each input of a matrix, by the matrix's name in GGUF.

``llama-imatrix`` writes them and ``llama-quantize --imatrix`` weighs errors by them. There are two layouts:

* GGUF, since 2025: ``NAME.in_sum2`` float32 ``[1, I]`` holds ``sum_t x_t**2`` and ``NAME.counts`` float32 ``[1, 1]`` the tokens.
  Keys: ``general.type`` is ``imatrix``; ``imatrix.datasets``, ``imatrix.chunk_count``, ``imatrix.chunk_size``. Neither layout says
  which model read the text; files written here add ``lowbit.model.name`` and ``lowbit.model.sha256``, which llama.cpp passes over.
* The older one, usually ``.dat``, little-endian: int32 number of entries; of each entry int32 length of the name, the name, int32
  chunks, int32 I, and float32 ``[I]``, the mean square times the chunks. Then int32 chunks, int32 length and bytes of the text's name.

Entries of experts (several matrices under one name) are refused: GGUF files of such models are not written here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from lowbit.architectures.gguf import gguf_architecture
from lowbit.checkpoints.formats.gguf_names import GgufNames
from lowbit.checkpoints.formats.gguf_reading import opened
from lowbit.checkpoints.shards import ModelError
from lowbit.whole_file import write_whole

_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MODEL = ("lowbit.model.name", "lowbit.model.sha256")
_OUTSIDE = ("output.weight", "token_embd.weight")
"""Matrices outside of the blocks that a file may have entries for. They are not read."""
LEGACY = ".dat"
"""Suffix of files in the older layout."""


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Args:
        entries: the result of :class:`~lowbit.numerics.SquareSum` by GGUF's name of the matrix: float64 ``[I + 1]``, sums of squares and
            the count that divides them. The count of a file in the older layout is in chunks.
        datasets: names of the texts.
        chunks, chunk_size: number of chunks of text, and tokens of each; 0 where the older layout does not say.
        model, model_sha256: name and fingerprint of the model that read the text; empty where the file does not say.
        warnings: what the user should know of the text; no file holds them.
    """

    entries: Mapping[str, Tensor]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    model: str = ""
    model_sha256: str = ""
    warnings: tuple[str, ...] = ()

    def of(
        self, names: GgufNames, widths: Mapping[str, int], wanted: Mapping[str, int], file: Path
    ) -> dict[str, Tensor]:
        """The entries of a model's linears, by name of the module.

        Args:
            names: of the model's tensors in GGUF.
            widths: input channels of every linear of the blocks, by name.
            wanted: the same of the linears that need an entry.
            file: for messages.

        Raises:
            ModelError: an entry of a matrix that the model does not have or of another width, or a wanted linear without an entry.
        """
        stored = {names(f"{name}.weight"): name for name in widths}
        foreign = sorted(self.entries.keys() - stored.keys() - set(_OUTSIDE))
        if foreign:
            raise ModelError(
                f"{file} is of another model: it has {len(foreign)} entries, such as {foreign[0]}, for matrices that this one lacks; "
                "make one with lowbit imatrix"
            )
        for entry, name in stored.items():
            found = self.entries.get(entry)
            if found is None and name in wanted:
                raise ModelError(
                    f"{file} has no entry for {entry} ({name}), which is to be quantized; make one with lowbit imatrix"
                )
            if found is not None and len(found) - 1 != widths[name]:
                raise ModelError(
                    f"{file} is of another model: {entry} has {len(found) - 1} inputs there and {widths[name]} here"
                )
        return {name: self.entries[entry] for entry, name in stored.items() if name in wanted}

    def doubts(self, sha256: str, file: Path) -> tuple[str, ...]:
        """A warning where the file says that a model with another fingerprint than ``sha256`` read its text. A copy of that model in
        another format or type has another one too, so this is no refusal."""
        if self.model_sha256 in ("", sha256):
            return ()
        return (
            f"{file} was made with {self.model} (fingerprint {self.model_sha256[:12]}), and this model has other bytes ({sha256[:12]}): "
            "unless one is a copy of the other in another form, errors are weighed by another model's inputs; make one with lowbit imatrix",
        )


def is_imatrix(path: Path) -> bool:
    """Whether a file looks like an importance matrix in either layout; any GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] == _MAGIC or len(start) < 8:
            return start[:4] == _MAGIC
        entries, length = struct.unpack("<2i", start)
        return entries > 0 and 0 < length <= 256 and file.read(length).endswith(b".weight")


def read_imatrix(path: Path) -> Imatrix:
    """Reads a file in either layout.

    Raises:
        ModelError: another or a damaged file, entries of experts, counts of zero, or sums that are negative or not finite.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    found = _read_gguf(path) if magic == _MAGIC else _read_legacy(path)
    if not found.entries:
        raise ModelError(f"{path}: no entries")
    for name, entry in found.entries.items():
        if not entry[-1] > 0:
            raise ModelError(f"{path}: no token reached {name} (count {entry[-1].item():g}); use more text")
        if not (torch.isfinite(entry).all() and (entry >= 0).all()):
            raise ModelError(f"{path}: {name} holds NaN, Inf or negative values; sums of squares are none of these")
    return found


def _read_gguf(path: Path) -> Imatrix:
    reader = opened(path)
    kind = _value(reader, "general.type")
    if kind != "imatrix":
        raise ModelError(f"{path}: general.type is {kind!r}, that of an importance matrix is 'imatrix'")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = {}
    for name in sorted(
        {name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in tensors if name.endswith((_SUMS, _COUNTS))}
    ):
        pair = [tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
        if any(each is None or each.tensor_type.name != "F32" for each in pair):
            raise ModelError(f"{path}: {name} needs {_SUMS} and {_COUNTS} in F32")
        sums, counts = (torch.from_numpy(np.array(each.data)).flatten() for each in pair if each is not None)
        if len(counts) != 1:
            raise ModelError(f"{path}: {name} has {len(counts)} experts under one name, which are not read")
        entries[name] = torch.cat([sums, counts]).double()
    datasets = _value(reader, "imatrix.datasets") or []
    chunks, size = (int(_value(reader, f"imatrix.{key}") or 0) for key in ("chunk_count", "chunk_size"))
    model, sha256 = (str(_value(reader, key) or "") for key in _MODEL)
    return Imatrix(entries, tuple(datasets), chunks, size, model, sha256)


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _read_legacy(path: Path) -> Imatrix:
    data, at = path.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise ModelError(f"{path}: not an importance matrix, or cut off at byte {len(data)}")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    entries: dict[str, Tensor] = {}
    for _ in range(number()):
        name = take(number()).decode(errors="replace")
        chunks = number()
        sums = np.frombuffer(take(4 * number()), "<f4")
        entries[name] = torch.from_numpy(np.append(sums.astype(np.float64), chunks))
    if at == len(data):  # files of 2023 end here
        return Imatrix(entries, (), 0, 0)
    chunks = number()
    text = take(number()).decode(errors="replace")
    return Imatrix(entries, (text,) if text else (), chunks, 0)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Writes ``path``: in the older layout if it ends in ``.dat``, else in GGUF's."""
    write_whole(path, partial(_write_legacy if path.suffix == LEGACY else _write_gguf, imatrix))


def _write_gguf(imatrix: Imatrix, path: Path) -> None:
    with closing(GGUFWriter(path, "")) as writer:
        writer.kv_data[0].pop("general.architecture", None)  # it is no model
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets))
        writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for key, value in zip(_MODEL, (imatrix.model, imatrix.model_sha256), strict=True):
            if value:
                writer.add_string(key, value)
        for name, entry in sorted(imatrix.entries.items()):
            values = entry.float().numpy()
            writer.add_tensor(name + _SUMS, values[None, :-1].copy())
            writer.add_tensor(name + _COUNTS, values[None, -1:].copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _write_legacy(imatrix: Imatrix, path: Path) -> None:
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        chunks = math.ceil(entry[-1].item() / max(1, imatrix.chunk_size))
        values = (entry[:-1] / entry[-1] * chunks).float().numpy().astype("<f4")
        parts += [
            struct.pack("<i", len(name)),
            name.encode(),
            struct.pack("<2i", chunks, len(values)),
            values.tobytes(),
        ]
    text = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    parts.append(struct.pack("<2i", imatrix.chunks, len(text)) + text)
    path.write_bytes(b"".join(parts))


def names_of(config: Any) -> GgufNames:
    """GGUF's names of the tensors of a transformers config. Raises ValueError for a model type without a GGUF file."""
    return GgufNames(gguf_architecture(config), config)
