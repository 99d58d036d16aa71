"""GGUF, the format of llama.cpp: one file with config, tokenizer and tensors, written with the package gguf.

Tensors are named, ordered and offset as llama.cpp wants them (:mod:`lowbit.architectures.gguf`); packed weights go into the type
that holds them as they are (:mod:`~lowbit.checkpoints.formats.gguf_types`). config.json and the tokenizer's files are kept in the
file as well, so that a model comes back as it was.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from lowbit.architectures import auto_class
from lowbit.architectures.gguf import GgufArchitecture, gguf_architecture, gguf_names
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.base import TensorRole, beside_codes, biases
from lowbit.checkpoints.formats.gguf_presets import PRESETS, types_of
from lowbit.checkpoints.formats.gguf_tokenizer import TOKENIZER, tokenizer_values
from lowbit.checkpoints.formats.gguf_types import decode, encode, type_of
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor, UsualAnswers
from lowbit.checkpoints.shards import ModelError
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.modules import LinearDescription
from lowbit.numerics import Spec, nearest

FILE = "model.gguf"
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {kind: dtype for dtype, kind in _FLOATS.items()}
CONFIG_KEY = "lowbit.config"
"""Key of the content of config.json in files that this module wrote."""
_FILES, _JSON = "lowbit.files", "tokenizer.huggingface.json"
_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_MOST_NOTED = 2**18  # bytes of a file that is kept beside the tokenizer


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

    def with_option(self, option: str) -> Gguf:
        """The format with matrices in floating point as f32, f16 or bf16, or with the types of a preset such as q4_k_m."""
        if option.lower() in PRESETS:
            return Gguf(preset=option.lower())
        if option.upper() not in _DTYPES:
            known = [*(each.lower() for each in _DTYPES), *PRESETS]
            raise ValueError(f"unknown option gguf:{option}{nearest(option, known)}; known are {', '.join(known)}")
        return Gguf(option.upper())

    def specs(self, tensors: Sequence[TensorRole], config: Any) -> Mapping[str, Spec] | None:
        if self.preset is None:
            return None
        tied = all(tensor.role != "head" for tensor in tensors)
        shared = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        return {name: kind.spec for name, kind in types_of(self.preset, tensors, shared, tied).items()}

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
        """Writes ``model.gguf``. The parts are read twice: for the list of tensors at its beginning, and for their content."""
        config = _config_of(model.config)
        entry = gguf_architecture(config)
        names = _Names(entry, config)
        with closing(GGUFWriter(directory / FILE, entry.name)) as writer:
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

    @property
    def _preferred(self) -> str | None:
        """The type of a preset of one type."""
        return None if self.preset is None else self.preset.upper()

    def _stored(self, part: PackedLayer | PlainTensor) -> tuple[str, tuple[int, ...]]:
        """The type of a part and its shape in numbers."""
        if isinstance(part, PackedLayer):
            kind = type_of(part.description.spec, part.description.shape, self._preferred)
            assert not isinstance(kind, str), kind
            return kind.name, part.description.shape
        shape = tuple(part.tensor.shape)
        if len(shape) == 1:
            return "F32", shape
        return self.floats or _FLOATS[part.tensor.dtype], shape

    def _content(self, part: PackedLayer | PlainTensor, names: _Names) -> Any:
        name = _weight_name(part)
        if isinstance(part, PackedLayer):
            try:
                _, data = encode(part.description.spec, part.description.shape, part.tensors, self._preferred)
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from error
        else:
            kind, _ = self._stored(part)
            added = names.entry.adds(name)
            value = part.tensor.float() + added if added else part.tensor
            data = value.to(_DTYPES[kind])
            if not torch.isfinite(data).all():
                raise ValueError(f"{name}: numbers beyond the range of {kind}; choose gguf:bf16 or gguf:f32")
        rows = names.entry.rows(name, names.config, tuple(data.shape))
        data = (data if rows is None else data[rows]).contiguous()
        return (data.view(torch.uint8) if data.dtype == torch.bfloat16 else data).numpy()

    def holds_packed(self, file: Path) -> bool:
        """Whether a file is of a known architecture and has weights that packed layers hold.

        Raises:
            ModelError: not a GGUF file, or a damaged one.
        """
        reader = _opened(file)
        architecture = reader.get_field("general.architecture")
        known = architecture is not None and architecture.contents() in gguf_names()
        return known and any(tensor.tensor_type.name in BLOCK_TYPES for tensor in reader.tensors)

    def read(self, directory: Path) -> PackedModel:
        """The model of a GGUF file, or of a directory with one, as a stream; each tensor is read when it is asked for.

        A weight of a type that no packed layer holds comes decoded.

        Raises:
            ModelError: no GGUF file, or one of a model that is not known here.
        """
        file = directory if directory.is_file() else directory / FILE
        reader = _opened(file)
        config, kept = _config_and_files(file, reader)
        try:
            entry = gguf_architecture(config)
        except ValueError as error:
            raise ModelError(f"{file}: {error}") from error
        return _Reading(file, reader, config, entry).model(kept)


def _opened(file: Path) -> GGUFReader:
    try:
        return GGUFReader(file)
    except Exception as error:  # it raises whatever damaged bytes lead it to
        raise ModelError(f"{file}: not a GGUF file, or a damaged one ({type(error).__name__}: {error})") from error


class _Names:
    """GGUF's names of a model's tensors, and back."""

    def __init__(self, entry: GgufArchitecture, config: Any):
        self.entry, self.config = entry, config
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == entry.name)
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def find(self, name: str) -> str | None:
        """The name of a tensor; None where the architecture does not have it."""
        return self._map.get_name(name, try_suffixes=(".weight", ".bias"))

    def __call__(self, name: str) -> str:
        """The name of a tensor. Raises ValueError where the architecture does not have it."""
        found = self.find(name)
        if found is None:
            raise ValueError(f"llama.cpp's {self.entry.name} has no tensor for {name}")
        return found


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
        add(_FILES, json.dumps({name: file.read_text(encoding="utf-8") for name, file in kept.items()}))


def _config_of(data: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    plain = {key: value for key, value in data.items() if key != "quantization_config"}
    return AutoConfig.for_model(**plain)


def _config_and_files(file: Path, reader: GGUFReader) -> tuple[Any, dict[str, str]]:
    """The config, and the content of the files of a tokenizer by name."""
    field = reader.get_field(CONFIG_KEY)
    if field is not None:
        files = reader.get_field(_FILES)
        kept = {} if files is None else json.loads(files.contents())
        tokenizer = reader.get_field(_JSON)
        if tokenizer is not None:
            kept[TOKENIZER] = tokenizer.contents()
        return _config_of(json.loads(field.contents())), {Path(name).name: text for name, text in kept.items()}
    from transformers import AutoConfig, AutoTokenizer

    try:
        config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with tempfile.TemporaryDirectory() as directory:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
            kept = {each.name: each.read_text(encoding="utf-8") for each in Path(directory).iterdir() if each.is_file()}
    except Exception as error:  # its parsers raise whatever a damaged file makes them raise
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file ({type(error).__name__}: {error})"
        ) from error
    return config, kept


class _Reading:
    """A GGUF file and the names that its tensors have in transformers."""

    def __init__(self, file: Path, reader: GGUFReader, config: Any, entry: GgufArchitecture):
        from accelerate import init_empty_weights

        self.file, self.config, self.entry = file, config, entry
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        with init_empty_weights(include_buffers=False):
            self.skeleton: Any = auto_class(config).from_config(config)
        tied = self.skeleton.all_tied_weights_keys
        names = _Names(entry, config)
        self.places: dict[str, str] = {}
        for name, tensor in self.skeleton.state_dict().items():
            stored = names.find(name)
            if stored not in self.tensors:
                if name in tied:
                    continue
                raise ModelError(f"{file}: no tensor {stored}, which is {name} of the model")
            if tuple(int(n) for n in reversed(self.tensors[stored].shape)) != tuple(tensor.shape):
                raise ModelError(f"{file}: tensor {stored} is not {list(tensor.shape)}, the shape of {name}")
            self.places[name] = stored
        self._refuse_unused(file)
        embedding = self.skeleton.get_input_embeddings()
        self.table = next(name for name, module in self.skeleton.named_modules() if module is embedding)
        self.heads = {name.rpartition(".")[0] for name in tied if name not in self.places}

    def _refuse_unused(self, file: Path) -> None:
        """Raises ModelError for tensors that the model of the config does not have: it would compute something else."""
        unused = self.tensors.keys() - set(self.places.values())
        divisors, stored = self.entry.frequencies(self.config), self.tensors.get("rope_freqs.weight")
        if divisors is not None and stored is not None and np.allclose(stored.data, divisors.numpy(), rtol=1e-5):
            unused -= {"rope_freqs.weight"}
        if unused:
            raise ModelError(
                f"{file}: {', '.join(sorted(unused)[:5])} have no place in a {self.config.model_type} model"
            )

    def model(self, kept: Mapping[str, str]) -> PackedModel:
        """The stream, with files of its tokenizer that last as long as it does."""
        layers, tables = {}, {}
        for name in self.places:
            path = name.rpartition(".")[0]
            found = self._packed(name)
            if found is not None:
                (tables if path == self.table else layers)[path] = found[0]
        description = ModelDescription(
            layers=layers, embeddings=tables, tied_heads=dict.fromkeys(self.heads, self.table or "") if tables else {}
        )
        directory = tempfile.TemporaryDirectory(prefix="lowbit-gguf-")
        files = []
        for name, text in kept.items():
            files.append(Path(directory.name) / name)
            files[-1].write_text(text, encoding="utf-8")
        config = self.config.to_dict() | {"architectures": [type(self.skeleton).__name__]}
        config.pop("quantization_config", None)
        config.setdefault("dtype", "float32")
        model = PackedModel(description, config, lambda: self._parts(description), tuple(files))
        weakref.finalize(model, directory.cleanup)
        return model

    def _parts(self, description: ModelDescription) -> Iterator[PackedLayer | PlainTensor]:
        described = {**description.layers, **description.embeddings}
        for name in self.places:
            path, _, leaf = name.rpartition(".")
            if path not in described:
                yield PlainTensor(name, self._plain(name))
            elif leaf == "weight":
                found = self._packed(name)
                assert found is not None
                layer, tensors = found
                if layer.bias is not None:
                    tensors["bias"] = self._plain(f"{path}.bias")
                yield PackedLayer(path, layer, tensors)

    def _packed(self, name: str) -> tuple[LinearDescription, dict[str, Tensor]] | None:
        """The packed layer of a weight; None for a weight that comes decoded."""
        tensor = self.tensors[self.places[name]]
        kind = BLOCK_TYPES.get(tensor.tensor_type.name)
        if kind is None or not name.endswith(".weight") or self.entry.adds(name):
            return None
        data = self._in_order(name, torch.from_numpy(np.array(tensor.data)))
        shape = (len(data), data.shape[1] // kind.nbytes * kind.elements)
        found = decode(kind, data, shape)
        if found is None:
            return None
        if name.rpartition(".")[0] == self.table and found[0].stats is not None:
            return None  # rows of a packed embedding are looked up one by one
        biased = f"{name.removesuffix('weight')}bias" in self.places
        return LinearDescription(found[0], shape, torch.float32 if biased else None), found[1]

    def _plain(self, name: str) -> Tensor:
        tensor = self.tensors[self.places[name]]
        if tensor.tensor_type.name in ("F32", "F16"):
            value = torch.from_numpy(np.array(tensor.data))
        elif tensor.tensor_type.name == "BF16":
            value = torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
        else:
            value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        added = self.entry.adds(name)
        return self._in_order(name, value - added if added else value)

    def _in_order(self, name: str, value: Tensor) -> Tensor:
        rows = self.entry.rows(name, self.config, tuple(value.shape))
        if rows is None:
            return value
        back = torch.empty_like(value)
        back[rows] = value
        return back
