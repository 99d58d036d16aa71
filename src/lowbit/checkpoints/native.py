"""Native checkpoints on disk: safetensors shards, their index, and config.json, which is written last.

Shards come first, one as each block is finished; the index and then config.json make a checkpoint of them. A directory
without config.json does not load, here or in transformers, so nothing half-written is taken for a model. Tensors carry
the names that they have in the running model; tensors of packed layers are laid out as :mod:`lowbit.layouts.canonical`
says. No pickle is read or written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit.architectures import attention_spec
from lowbit.checkpoints.description import METHOD, layer_configs, quantization_config
from lowbit.checkpoints.shards import INDEX, ModelError, TensorHeader, read_headers, read_json, read_shard_header
from lowbit.modules import AttentionSpec, QuantLinear, buffer_layout, features, residual_of, stored_bits_of
from lowbit.modules.quant_linear import Config

CONFIG = "config.json"
_JOURNAL = "journal.jsonl"  # of a run that writes here; gone when it has finished
_CONTINUE = "run the command that makes it again, and it continues where it stopped"
SHARD_METADATA = {"format": "pt"}


def write_checkpoint_index(
    directory: str | os.PathLike[str], shard_files: Iterable[str], config: Mapping[str, Any]
) -> None:
    """Makes a checkpoint of shards that are already in ``directory``: writes the index, then config.json.

    Args:
        directory: where the shards are.
        shard_files: their names, such as ``model-00001-of-00031.safetensors``.
        config: what config.json shall hold: the model's config with ``quantization_config``
            (see :func:`lowbit.checkpoints.description.quantization_config`).

    Raises:
        ValueError: a shard that is missing or damaged, a tensor in two shards, or a packed layer that is not whole.
    """
    directory = Path(directory)
    headers: dict[str, TensorHeader] = {}
    for shard in sorted(shard_files):
        if not (directory / shard).is_file():
            raise ModelError(f"{directory}: the shard {shard} is missing; was it written?")
        found = read_shard_header(directory / shard)
        for name in found.keys() & headers.keys():
            raise ModelError(f"{directory}: tensor {name} is in two shards, {headers[name].file.name} and {shard}")
        headers |= found
    check_layers(directory, config["quantization_config"], headers)
    index = {
        "metadata": {"total_size": sum(header.nbytes for header in headers.values())},
        "weight_map": {name: header.file.name for name, header in headers.items()},
    }
    _write_json(directory / INDEX, index)
    _write_json(directory / CONFIG, config)


def _write_json(path: Path, value: Any) -> None:
    """Sorted, flushed and renamed into place, so that the file is whole or not there."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_checkpoint(
    directory: str | os.PathLike[str],
    config: Any,
    layers: Mapping[str, QuantLinear] | Mapping[str, Config],
    shard_files: Iterable[str],
    dtype: torch.dtype,
    attention: Mapping[str, AttentionSpec] | None = None,
    residual: Mapping[str, Any] | None = None,
) -> None:
    """:func:`write_checkpoint_index` with the parts that a quantization run has at its end.

    Args:
        directory, shard_files: the shards, already written, tensors named as in the running model.
        config: the transformers config of the original.
        layers: the packed layers, or their descriptions, by module name.
        dtype: of what is not packed.
        attention: the formats of attention's operands, by name of the module that attends.
        residual: the rotation of the stream between the blocks, as :func:`lowbit.modules.described_residual` says it.
    """
    directory, shard_files = Path(directory), sorted(shard_files)
    names = {
        name for shard in shard_files if (directory / shard).is_file() for name in read_shard_header(directory / shard)
    }
    unfused = any(_OF_EXPERT.search(name) for name in names)
    description = quantization_config(layers, unfused_experts=unfused, attention=attention, residual=residual)
    # "_name_or_path" is where the original lay on the machine that quantized it.
    left_out = ("quantization_config", "_name_or_path")
    plain = {key: value for key, value in config.to_dict().items() if key not in left_out}
    dtype_name = str(dtype).removeprefix("torch.")
    write_checkpoint_index(directory, shard_files, plain | {"dtype": dtype_name, "quantization_config": description})


# A tensor of one expert's own linear, which transformers' models hold fused.
_OF_EXPERT = re.compile(r"\.\d+\.(gate|up|down)_proj\.")


def save(model: Any, directory: str | os.PathLike[str], *, shard_bytes: int = 4 * 2**30) -> None:
    """Writes a quantized transformers model that is in memory as a native checkpoint (without a tokenizer).

    Raises:
        ValueError: nothing in the model is quantized, or ``directory`` has files already.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; choose another directory or remove it")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    quantization_config(layers)  # raises before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(_untied(model), shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, directory / name, metadata=SHARD_METADATA)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    specs = {name: attention_spec(module) for name, module in model.named_modules()}
    attention = {name: spec for name, spec in specs.items() if spec is not None}
    write_checkpoint(directory, model.config, layers, names, model.dtype, attention, residual_of(model))


def _untied(model: Any) -> dict[str, Tensor]:
    """The state, contiguous, without the names that are tied to others."""
    tied = model.all_tied_weights_keys
    return {name: t.detach().contiguous() for name, t in model.state_dict().items() if name not in tied}


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def read_checkpoint(
    directory: str | os.PathLike[str], *, unfinished: bool = False
) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """The config and every tensor's header of a model directory, native or not, checked without reading weights.

    ``unfinished`` reads a directory whose run has written everything but not been declared finished.

    Raises:
        ModelError: not a directory, unfinished, a missing or truncated shard, or a packed layer that is not whole.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    if not directory.is_dir():
        hint = f"; {partial} holds an unfinished run: {_CONTINUE}" if partial.is_dir() else ""
        raise ModelError(f"{directory}: no such directory{hint}")
    if (directory / _JOURNAL).is_file() and not unfinished:
        raise ModelError(f"{directory}: an unfinished run; {_CONTINUE}")
    if not (directory / CONFIG).is_file():
        if any(directory.glob("*.safetensors")):
            raise ModelError(
                f"{directory}: unfinished, it has weights but no {CONFIG}, which is written last; {_CONTINUE}"
            )
        raise ModelError(f"{directory}: no {CONFIG}; expected a directory that lowbit or save_pretrained wrote")
    config = read_json(directory / CONFIG)
    headers = read_headers(directory)
    if is_native(config):
        check_layers(directory, config["quantization_config"], headers)
    return config, headers


def load(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    unfinished: bool = False,
) -> Any:
    """A running transformers model, in evaluation mode, from a native checkpoint or from an ordinary model directory.

    Args:
        directory: a local directory.
        dtype: of everything that is not packed, and so of the computation; None: the one in config.json. Packed tensors
            are the same bits whatever it is.
        device: where to put the model.
        trust_remote_code: lets the model's own Python code run.
        unfinished: loads a directory that its run has not declared finished; for the run's own last check.

    Raises:
        ModelError: a ValueError that says what is wrong: an unfinished directory, a missing or truncated shard, a layer
            that lacks a tensor, an unknown version. Pickled weights are never read.
    """
    directory = Path(directory)
    config, _ = read_checkpoint(directory, unfinished=unfinished)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    model, info = loaded
    lost = sorted(info["missing_keys"]) + (sorted(info["unexpected_keys"]) if is_native(config) else [])
    if lost:
        raise ModelError(
            f"{directory}: the checkpoint and the model that config.json describes differ in {len(lost)} tensors: "
            f"{', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}. "
            "It is incomplete or config.json is of another model"
        )
    return model.to(device).eval()


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a lowbit checkpoint."""
    description = config.get("quantization_config")
    return isinstance(description, Mapping) and description.get("quant_method") == METHOD


def check_layers(directory: Path, description: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raises ModelError unless every tensor of every packed layer is there, in the shape and dtype described."""
    try:
        configs = layer_configs(description)
    except ValueError as error:
        raise ModelError(f"{directory}: {error}") from error
    for layer, config in configs.items():
        for buffer, (shape, dtype) in buffer_layout(config).items():
            name = f"{layer}.{buffer}"
            if name not in headers:
                raise ModelError(
                    f"{directory}: tensor {name} of a quantized layer is not in the checkpoint; it is incomplete, "
                    "copy it or quantize the model again"
                )
            if (headers[name].shape, headers[name].dtype) != (shape, dtype):
                raise ModelError(
                    f"{directory}: tensor {name} is {headers[name].dtype} {list(headers[name].shape)}, config.json "
                    f"describes {dtype} {list(shape)}; the files are of different checkpoints"
                )


def bits_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """How large a native checkpoint is, from headers and config alone; every stored bit is counted.

    Returns:
        ``bytes``: of the weight files. ``quantized_bytes``: of packed layers without their biases (codes, scales, zero
        points, transforms, static activation parameters). ``quantized_weights``: how many weights these replace.
        ``bits_per_weight``: of the packed layers. ``model_bits_per_weight``: all tensors over all parameters of the
        model. ``layers``: how many are packed.

    Raises:
        ModelError: not a native checkpoint, or a damaged one.
    """
    config, headers = read_checkpoint(directory)
    if not is_native(config):
        raise ModelError(f"{directory}: not quantized by lowbit; {CONFIG} has no quantization_config of it")
    configs = layer_configs(config["quantization_config"])
    quantized_bits = sum(stored_bits_of(layer) for layer in configs.values())
    quantized = sum(features(layer)[0] * features(layer)[1] for layer in configs.values())
    packed = {
        f"{name}.{buffer}" for name, layer in configs.items() for buffer in buffer_layout(layer) if buffer != "bias"
    }
    others = [header for name, header in headers.items() if name not in packed]
    other_bits = 8 * sum(header.nbytes for header in others)
    parameters = quantized + sum(torch.Size(header.shape).numel() for header in others)
    return {
        "bytes": sum(file.stat().st_size for file in {header.file for header in headers.values()}),
        "quantized_bytes": quantized_bits // 8,
        "quantized_weights": quantized,
        "bits_per_weight": quantized_bits / quantized,
        "model_bits_per_weight": (quantized_bits + other_bits) / parameters,
        "layers": len(configs),
    }


def bits_per_weight(model: nn.Module) -> float | None:
    """Stored bits over replaced weights of a model's packed layers, biases left out; None where nothing is packed."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(layer.stored_bits for layer in layers) / weights if layers else None


__all__ = [
    "SHARD_METADATA",
    "bits_per_weight",
    "bits_report",
    "check_layers",
    "is_native",
    "load",
    "read_checkpoint",
    "save",
    "write_checkpoint",
    "write_checkpoint_index",
]
