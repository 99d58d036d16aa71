"""Safetensors shards read directly: headers in milliseconds, one tensor (or some of its rows) at a time.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, then raw bytes. Reading it with
plain `seek` and `readinto` rather than through a memory map is a choice: mapped pages of every tensor ever touched
count as resident memory until the map is closed, so a walk over a large model would appear to hold all of it. Here a
tensor is read once into memory of its own and nothing else stays.

Everything that can be wrong with the files is found here before any weight is read: every byte of a shard must belong
to exactly one tensor, which is what catches a truncated download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit, so that a corrupt length cannot ask for the whole memory
_WHOLE = 64 * 2**20  # bytes; files up to this size are hashed whole, larger ones by samples
_SAMPLE = 4096  # bytes
_PIECE = 16 * 2**20  # bytes that are copied at once

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_FEW = 1000
"""Layers that a model may have with fewer tensors, because it shares them."""


class ModelError(ValueError):
    """A model that cannot be used as given; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies: `nbytes` bytes from byte `start` of `file`, row-major, little-endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Checks the shards of a model directory and returns every tensor's header, by checkpoint name.

    Reads headers only, never weights. Raises ModelError for a missing or truncated shard, an index that points
    outside the directory or names tensors its shards do not have, and for pickled weights (which are never read).
    """
    index = _read_index(directory) if not (directory / WEIGHTS).is_file() else {}
    files = sorted({directory / shard for shard in index.values()}) or [directory / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of the {len(files)} shards that {INDEX} names are missing: "
            f"{_some(missing)}. Copy or download them again."
        )
    shards = {file.name: read_shard_header(file) for file in files}
    lost = [name for name, shard in index.items() if name not in shards[shard]]
    if lost:
        raise ModelError(
            f"{directory}: {INDEX} names {len(lost)} tensors that are not in their shards: {_some(lost)}. "
            "The index and the shards come from different versions; download the model again."
        )
    headers = {name: header for shard in shards.values() for name, header in shard.items()}
    headers |= {name: shards[shard][name] for name, shard in index.items()}  # the index decides between duplicates
    if not headers:
        raise ModelError(f"{directory}: the safetensors files hold no tensors; expected a model's weights.")
    return headers


def _read_index(directory: Path) -> dict[str, str]:
    """The index's weight map, tensor name -> file name, checked to stay inside the directory."""
    path = directory / INDEX
    if not path.is_file():
        raise ModelError(_no_weights(directory))
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: no weight_map, or an empty one; expected tensor name -> file name.")
    for name, shard in weight_map.items():
        # Compared as text, not resolved: the files of a hub cache are themselves links out of their directory.
        if not isinstance(shard, str) or shard in ("", "..") or "\\" in shard or PurePosixPath(shard).name != shard:
            raise ModelError(
                f"{path}: tensor {name!r} points outside the model directory, to {shard!r}. Expected a file name "
                "beside the index. Do not use this model unless you know where it comes from."
            )
    return weight_map


def _no_weights(directory: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        return (
            f"{directory}: the weights are pickled ({_some(pickles)}) and pickle can run code, so it is never read. "
            "Expected safetensors. If you trust the files, convert them once: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), and use NEW_DIR."
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    content = f"found only {_some(others)}" if others else "found no .safetensors file"
    return f"{directory}: {content}; expected {WEIGHTS} or {INDEX}. Check that this is a model's directory."


def read_shard_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, checked to cover its bytes exactly. Raises ModelError otherwise."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise ModelError(
                f"{file}: {size} bytes with a header said to take {length}; the file is truncated or is not "
                "safetensors. Copy or download it again."
            )
        raw = stream.read(length)
    entries = _parse(raw, file)
    entries.pop("__metadata__", None)
    headers = {name: _tensor_header(name, entry, file, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, header in sorted(headers.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if header.start != end:
            raise ModelError(f"{file}: corrupt header, tensor {name!r} starts at byte {header.start} instead of {end}.")
        end += header.nbytes
    if end != size:
        kind = "truncated" if size < end else "followed by unknown bytes"
        raise ModelError(f"{file}: {kind}: {size} bytes, its header describes {end}. Copy or download it again.")
    return headers


def _tensor_header(name: str, entry: Any, file: Path, data: int) -> TensorHeader:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{file}: corrupt header, tensor {name!r} is described by {str(entry)[:80]}.") from None
    if dtype not in _DTYPES:
        raise ModelError(f"{file}: tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(_DTYPES)}.")
    if not sound or end - begin != prod(shape) * _DTYPES[dtype].itemsize:
        raise ModelError(
            f"{file}: corrupt header, tensor {name!r} of dtype {dtype} and shape {list(shape)} "
            f"is said to lie at bytes {begin} to {end}."
        )
    return TensorHeader(_DTYPES[dtype], shape, file, data + begin, end - begin)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; ModelError when it is not one."""
    return _parse(path.read_bytes(), path)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply for a model's file. Copy or download it again.") from None
    except (UnicodeDecodeError, ValueError) as error:  # JSON's own error is a ValueError
        raise ModelError(f"{path}: not valid JSON ({error}). Copy or download it again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) != len(pairs):
        raise ValueError("the same name twice")
    return value


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_tensor(header: TensorHeader, rows: tuple[int, int] | None = None) -> Tensor:
    """Reads one tensor, or rows [first, last) of its leading axis, into memory of its own, in its stored dtype."""
    shape, start = header.shape, header.start
    if rows is not None:
        row_bytes = header.nbytes // shape[0]
        shape, start = (rows[1] - rows[0], *shape[1:]), start + rows[0] * row_bytes
    flat = torch.empty(prod(shape), dtype=header.dtype)
    array: Any = flat.view(torch.uint8).numpy()
    target = memoryview(array)
    with open(header.file, "rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < len(target):  # one call reads at most 2 GiB
            count = stream.readinto(target[done:])
            if not count:
                raise ModelError(f"{header.file}: ended at byte {start + done}; it was cut while in use.")
            done += count
    return flat.view(shape)


def shard_names(count: int) -> list[str]:
    """The names of a checkpoint's shards; a single one has the name that loaders look for first."""
    return [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def join_tensors(file: Path, tensors: Mapping[str, TensorHeader], empty: str | None = None) -> None:
    """Writes stored tensors, byte for byte, into one new shard, in pieces: no tensor is held.

    Wide types come first, as safetensors has them, so that all values are aligned.

    Args:
        tensors: where each of them lies now.
        empty: the name of one more tensor, of no values.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, each in ordered:
        header[name] = {
            "dtype": codes[each.dtype],
            "shape": each.shape,
            "data_offsets": (end, end := end + each.nbytes),
        }
    if empty is not None:
        header[empty] = {"dtype": "U8", "shape": (0,), "data_offsets": (end, end)}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as target:
        target.write(len(raw).to_bytes(8, "little") + raw)
        for _, each in ordered:
            _copy(each, target)


def _copy(header: TensorHeader, target: Any) -> None:
    """Appends the bytes of a stored tensor to an open file."""
    left = header.nbytes
    with open(header.file, "rb", buffering=0) as stream:
        stream.seek(header.start)
        while left:
            piece = stream.read(min(left, _PIECE))
            if not piece:
                raise ModelError(f"{header.file}: ended {left} bytes early; it was cut while in use.")
            target.write(piece)
            left -= len(piece)


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a shard that whoever may read new files here may read.

    safetensors writes a file for its owner alone, so the mode is taken from one that is made as others are.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(mode)


def fingerprint(config: Path, headers: dict[str, TensorHeader]) -> str:
    """A sha256 of what a model is: its config, every tensor's header, file sizes, and its bytes.

    Files up to 64 MiB are hashed whole; of larger ones, the first, middle and last 4 KiB of every tensor. It does not
    depend on where the directory is, nor on the transformers that wrote the config: a GGUF file converted after an upgrade is
    the same model. It guards a resumed run against a changed model, not against forgery.
    """
    said = {key: value for key, value in read_json(config).items() if key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    by_file: dict[Path, list[TensorHeader]] = {}
    for name, header in sorted(headers.items()):
        digest.update(repr((name, header.dtype, header.shape, header.file.name, header.start)).encode())
        by_file.setdefault(header.file, []).append(header)
    for file, tensors in sorted(by_file.items()):
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        with open(file, "rb") as stream:
            if size <= _WHOLE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for header in tensors:
                for part in (0, header.nbytes // 2, max(0, header.nbytes - _SAMPLE)):
                    stream.seek(header.start + part)
                    digest.update(stream.read(min(_SAMPLE, header.nbytes - part)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_adapter(directory: Path) -> None:
    """Raises ModelError where an adapter lies next to a model's weights: one reader would apply it, another would not."""
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory}: adapter_config.json lies next to the weights, so it is not clear which model is meant. Merge the "
            "adapter first (lowbit merge-adapter where the weights are packed, else merge_and_unload of peft), or move its files to a "
            "directory of their own and load it beside the model: PeftModel.from_pretrained(lowbit.load(DIR), ADAPTER)."
        )


def refuse_more_layers(directory: Path, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raises ModelError where config.json asks for more layers than there are tensors: making them takes for ever."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for name in _LAYER_COUNTS:
            if type(count := part.get(name)) is int and count > max(len(headers), _FEW):
                raise ModelError(
                    f"{directory}: config.json says {name} = {count}, and the checkpoint has {len(headers)} tensors. It is "
                    "incomplete or config.json is of another model"
                )


def seem_equal(a: TensorHeader, b: TensorHeader, samples: int = 64) -> bool:
    """Whether two stored tensors agree in dtype, shape and `samples` evenly spaced pieces of 4 KiB."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.file, "rb") as first, open(b.file, "rb") as second:
        for index in range(samples):
            offset = index * max(0, a.nbytes - _SAMPLE) // max(1, samples - 1)
            count = min(_SAMPLE, a.nbytes - offset)
            first.seek(a.start + offset)
            second.seek(b.start + offset)
            if first.read(count) != second.read(count):
                return False
    return True
