"""A GGUF file as a stream of packed layers and plain tensors under transformers' names."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from lowbit.architectures import auto_class
from lowbit.architectures.gguf import GgufArchitecture
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.formats.gguf_names import GgufNames
from lowbit.checkpoints.formats.gguf_tokenizer import TOKENIZER
from lowbit.checkpoints.formats.gguf_types import decode
from lowbit.checkpoints.formats.gguf_writing import CONFIG_KEY, FILES_KEY, TOKENIZER_KEY, config_of
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor
from lowbit.checkpoints.shards import ModelError
from lowbit.layouts.ggml import BLOCK_TYPES
from lowbit.modules import LinearDescription


class _Reader(GGUFReader):
    """Reads through a plain array: a slice of a memmap costs several times as much, and every string of a vocabulary is four."""

    def _get(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return super()._get(*arguments, **options)


def opened(file: Path) -> GGUFReader:
    """A GGUF file. Raises ModelError for what is none, or a damaged one."""
    try:
        return _Reader(file)
    except Exception as error:  # it raises whatever damaged bytes lead it to
        raise ModelError(f"{file}: not a GGUF file, or a damaged one ({type(error).__name__}: {error})") from error


def config_and_files(file: Path, reader: GGUFReader) -> tuple[Any, dict[str, str]]:
    """The config, and the content of the files of a tokenizer by name."""
    field = reader.get_field(CONFIG_KEY)
    if field is not None:
        files = reader.get_field(FILES_KEY)
        kept = {} if files is None else json.loads(files.contents())
        tokenizer = reader.get_field(TOKENIZER_KEY)
        if tokenizer is not None:
            kept[TOKENIZER] = tokenizer.contents()
        return config_of(json.loads(field.contents())), {Path(name).name: text for name, text in kept.items()}
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


class Reading:
    """A GGUF file and the names that its tensors have in transformers."""

    def __init__(self, file: Path, reader: GGUFReader, config: Any, entry: GgufArchitecture):
        from accelerate import init_empty_weights

        self.file, self.config, self.entry = file, config, entry
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        with init_empty_weights(include_buffers=False):
            self.skeleton: Any = auto_class(config).from_config(config)
        tied = self.skeleton.all_tied_weights_keys
        names = GgufNames(entry, config)
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
