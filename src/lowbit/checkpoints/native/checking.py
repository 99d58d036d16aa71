"""What a native checkpoint must be before anything of it runs: headers against config and model, then values.

Everything is refused with one line that names the directory, the tensor and the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.packed_model import PackedLayer, PlainTensor
from lowbit.checkpoints.shards import ModelError, TensorHeader
from lowbit.modules import (
    CacheCalibration,
    OperandRanges,
    QuantEmbedding,
    QuantLinear,
    ResidualMatrix,
    check_finite,
    check_tensors,
    prepare,
)

_EPSILONS = frozenset({"eps", "variance_epsilon"})
_FREQUENCIES = frozenset({"inv_freq", "original_inv_freq"})
"""What modules compute from config.json, and would spread NaN from."""


def check_layers(
    directory: Path, quantization_config: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> ModelDescription:
    """The description in a config.json, checked against the tensors that are there.

    Raises:
        ModelError: a damaged description, or a tensor of a packed layer that is missing or has another shape or dtype than
            the one described.
    """
    try:
        description = ModelDescription.from_json(quantization_config)
    except ValueError as error:
        raise ModelError(f"{directory}: {error}") from error
    for layer, layer_description in {**description.layers, **description.embeddings}.items():
        for buffer, (shape, dtype) in layer_description.layout().items():
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
    return description


def check_places(directory: Path, model: Any, headers: Mapping[str, TensorHeader]) -> None:
    """Checks that every tensor of ``model``, which has no content yet, is in the checkpoint with its shape and kind of number.

    A model with another head than the one that was quantized brings that head itself.

    Raises:
        ModelError: a tensor that is missing, or is of another model.
    """
    prefix = f"{model.base_model_prefix}."
    tied = model.all_tied_weights_keys
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    inside = not hasattr(model, model.base_model_prefix)
    for name, tensor in model.state_dict().items():
        header = headers.get(name) or headers.get(prefix + name) or headers.get(name.removeprefix(prefix))
        if header is None:
            own_head = not (whole or inside or name.startswith(prefix))
            if name in tied or name in tied.values() or own_head or any(p.search(name) for p in optional):
                continue
            raise ModelError(
                f"{directory}: tensor {name} of the model that config.json describes is not in the checkpoint: it is "
                "incomplete, or config.json is of another model"
            )
        if header.shape != tuple(tensor.shape) or header.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ModelError(
                f"{directory}: tensor {name} is {header.dtype} {list(header.shape)}, the model that config.json describes "
                f"has {tensor.dtype} {list(tensor.shape)}: config.json is of another model"
            )


def check_and_prepare(directory: Path, model: nn.Module) -> None:
    """Checks the values of every tensor of a model that was loaded, and prepares its packed layers.

    Raises:
        ModelError: NaN, Inf, or other values that no model of this description has.
    """
    try:
        prepare(model)
        for path, module in model.named_modules():
            if isinstance(module, OperandRanges | CacheCalibration | QuantEmbedding | ResidualMatrix):
                module.check(path)
            if isinstance(module, QuantLinear):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    check_finite(f"tensor {path}.{name}", parameter.detach())
            for name in _EPSILONS & module.__dict__.keys():
                if isinstance(value := getattr(module, name), float) and not 0 <= value < math.inf:
                    raise ValueError(f"{name} of {path} is {value} in config.json, expected a small number")
            for name in _FREQUENCIES & module._buffers.keys():
                check_finite(f"{name} of {path}, which config.json places,", module.get_buffer(name))
    except ValueError as error:
        raise ModelError(f"{directory}: {error}; the file is damaged, copy it or quantize the model again") from error


def checked(directory: Path, parts: Iterator[PackedLayer | PlainTensor]) -> Iterator[PackedLayer | PlainTensor]:
    """``parts``, each checked when it is read. Raises ModelError for values that no model of this description has."""
    for part in parts:
        try:
            if isinstance(part, PackedLayer):
                check_tensors(part.description, part.tensors)
            else:
                check_finite(part.name, part.tensor)
        except ValueError as error:
            field = f"{part.name}.{error}" if isinstance(part, PackedLayer) else str(error)
            raise ModelError(f"{directory}: tensor {field}; the file is damaged") from error
        yield part
