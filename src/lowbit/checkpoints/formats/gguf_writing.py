"""A packed model as one GGUF file: keys, the list of tensors, and their content.

The parts of the model are read twice: for the list of tensors at the beginning of the file, and for their content.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from lowbit.architectures.gguf import GgufArchitecture, gguf_architecture
from lowbit.checkpoints.formats.gguf_names import GgufNames
from lowbit.checkpoints.formats.gguf_tokenizer import tokenizer_values
from lowbit.checkpoints.formats.gguf_types import encode, type_of
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {kind: dtype for dtype, kind in _FLOATS.items()}
"""Types of plain tensors."""
CONFIG_KEY = "lowbit.config"
"""Key of the content of config.json in files that this module wrote."""
FILES_KEY, TOKENIZER_KEY = "lowbit.files", "tokenizer.huggingface.json"
"""Keys of other files' content by name, and of tokenizer.json."""
_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_MOST_NOTED = 2**18  # bytes of a file that is kept beside the tokenizer


@dataclass(frozen=True)
class Writing:
    """How a model is written.

    Args:
        floats: the type of matrices that are not packed: F32, F16 or BF16; None: that of their own dtype.
        preferred: the type that a weight has where two hold it; None: the first.
    """

    floats: str | None
    preferred: str | None

    def write(self, model: PackedModel, file: Path) -> None:
        """Writes ``file``. Raises ValueError for numbers that no type holds, which no description tells."""
        config = config_of(model.config)
        entry = gguf_architecture(config)
        names = GgufNames(entry, config)
        with closing(GGUFWriter(file, entry.name)) as writer:
            _write_keys(writer, entry, config, model)
            kinds: Counter[str] = Counter()
            for part in model.parts():
                kind, shape = self._stored(part)
                kinds[kind] += int(np.prod(shape))
                _announce(writer, names(_weight_name(part)), kind, shape)
                if isinstance(part, PackedLayer) and part.description.bias is not None:
                    _announce(writer, names(f"{part.name}.bias"), "F32", (shape[0],))
            divisors = entry.frequencies(config)
            if divisors is not None:
                _announce(writer, "rope_freqs.weight", "F32", tuple(divisors.shape))
            writer.add_file_type(_file_type(kinds))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for part in model.parts():
                writer.write_tensor_data(self._content(part, names))
                if isinstance(part, PackedLayer) and part.description.bias is not None:
                    bias = PlainTensor(f"{part.name}.bias", part.tensors["bias"])
                    writer.write_tensor_data(self._content(bias, names))
            if divisors is not None:
                writer.write_tensor_data(divisors.numpy())

    def _stored(self, part: PackedLayer | PlainTensor) -> tuple[str, tuple[int, ...]]:
        """The type of a part and its shape in numbers."""
        if isinstance(part, PackedLayer):
            kind = type_of(part.description.spec, part.description.shape, self.preferred)
            assert not isinstance(kind, str), kind
            return kind.name, part.description.shape
        shape = tuple(part.tensor.shape)
        if len(shape) == 1:
            return "F32", shape
        return self.floats or _FLOATS[part.tensor.dtype], shape

    def _content(self, part: PackedLayer | PlainTensor, names: GgufNames) -> Any:
        name = _weight_name(part)
        if isinstance(part, PackedLayer):
            try:
                _, data = encode(part.description.spec, part.description.shape, part.tensors, self.preferred)
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from error
        else:
            kind, _ = self._stored(part)
            added = names.entry.adds(name)
            value = part.tensor.float() + added if added else part.tensor
            data = value.to(DTYPES[kind])
            if not torch.isfinite(data).all():
                raise ValueError(f"{name}: numbers beyond the range of {kind}; choose gguf:bf16 or gguf:f32")
        rows = names.entry.rows(name, names.config, tuple(data.shape))
        data = (data if rows is None else data[rows]).contiguous()
        return (data.view(torch.uint8) if data.dtype == torch.bfloat16 else data).numpy()


def _weight_name(part: PackedLayer | PlainTensor) -> str:
    return f"{part.name}.weight" if isinstance(part, PackedLayer) else part.name


def _announce(writer: GGUFWriter, name: str, kind: str, shape: tuple[int, ...]) -> None:
    number = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if kind == "F32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, number)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=number)


def _file_type(kinds: Counter[str]) -> int:
    """The type that most numbers have, as llama.cpp numbers files."""
    most = kinds.most_common(1)[0][0]
    name = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}.get(most)
    return LlamaFileType[name or f"MOSTLY_{most}"] if most != "MXFP4" else LlamaFileType.MOSTLY_MXFP4_MOE


def _write_keys(writer: GGUFWriter, entry: GgufArchitecture, config: Any, model: PackedModel) -> None:
    def add(key: str, value: Any) -> None:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)

    writer.add_type("model")
    writer.add_name(str(model.config.get("_name_or_path") or config.model_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in entry.metadata(config).items():
        add(f"{entry.name}.{key}", value)
    files = {file.name: file for file in model.files}
    source = next((file.parent for file in files.values()), None)
    tokenizer = {} if source is None else tokenizer_values(source, config.vocab_size)
    for key, value in (tokenizer or {"ggml.model": "none"}).items():
        add(f"tokenizer.{key}", value)
    add(CONFIG_KEY, json.dumps(dict(model.config), sort_keys=True))
    kept = {name: files[name] for name in _KEPT if name in files and files[name].stat().st_size <= _MOST_NOTED}
    if kept:
        add(FILES_KEY, json.dumps({name: file.read_text(encoding="utf-8") for name, file in kept.items()}))


def config_of(data: Mapping[str, Any]) -> Any:
    """The transformers config of the content of a config.json."""
    from transformers import AutoConfig

    plain = {key: value for key, value in data.items() if key != "quantization_config"}
    return AutoConfig.for_model(**plain)
