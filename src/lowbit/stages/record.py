"""What the walk keeps of a finished block: a record in the journal, and how its tensors become a block again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lowbit.modules import (
    AttentionSpec,
    CacheCalibration,
    CalibrationSpec,
    LinearDescription,
    OperandRanges,
    QuantLinear,
    ResidualMatrix,
)
from lowbit.numerics import from_dict, narrowed, to_dict
from lowbit.plan.kept import Kept
from lowbit.steps import LayerRecord


@dataclass
class BlockRecord:
    """What a block cost. ``error``: relative squared difference of the two streams behind it, None without calibration."""

    name: str
    error: float | None
    layers: list[LayerRecord]
    notes: list[str] = field(default_factory=list)
    modules: dict[str, LinearDescription] = field(default_factory=dict)  # of the packed linears by full name
    attention: dict[str, AttentionSpec] = field(default_factory=dict)  # formats of attention's operands, likewise
    cache: dict[str, CalibrationSpec] = field(default_factory=dict)  # what was found for the cache, likewise
    latents: str = ""  # sha256 of the file with the weights that codes were rounded from; empty: there is none

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {
            "name": self.name,
            "error": self.error,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "notes": self.notes,
            "modules": {name: description.to_json() for name, description in self.modules.items()},
            "attention": {name: to_dict(spec) for name, spec in self.attention.items()},
            "cache": {name: to_dict(spec) for name, spec in self.cache.items()},
            **({"latents": self.latents} if self.latents else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRecord:
        layers = [LayerRecord(**{**layer, "notes": tuple(layer["notes"])}) for layer in data["layers"]]
        modules = {name: LinearDescription.from_json(each) for name, each in data["modules"].items()}
        attention = {name: from_dict(spec) for name, spec in data["attention"].items()}
        cache = {name: from_dict(spec) for name, spec in data["cache"].items()}
        return cls(**{**data, "layers": layers, "modules": modules, "attention": attention, "cache": cache})


def as_stored(block: nn.Module) -> set[str]:
    """Paths of the block's modules whose tensors are stored in their own dtypes."""
    kinds = (QuantLinear, OperandRanges, CacheCalibration, ResidualMatrix)
    return {path for path, module in block.named_modules() if isinstance(module, kinds)}


def stored_tensors(block: nn.Module, name: str, kept: Kept) -> dict[str, Tensor]:
    """What the finished block ``name`` stores: packed buffers as they are, everything else in the dtype that it is kept in."""
    packed = as_stored(block)

    def stored(key: str, value: Tensor) -> Tensor:
        if key.rpartition(".")[0] in packed or not value.is_floating_point():
            return value
        return narrowed(f"{name}.{key}", value, kept.dtype_of(f"{name}.{key}"))

    return {f"{name}.{key}": stored(key, value.detach()) for key, value in block.state_dict().items()}


def install_packed(
    block: nn.Module, name: str, modules: dict[str, LinearDescription], tensors: dict[str, Tensor]
) -> None:
    """Puts packed linears and stored tensors (names with prefix ``name``) into an original block, in place."""
    for full, description in modules.items():
        block.set_submodule(full.removeprefix(f"{name}."), QuantLinear.empty(description))
    local = {key.removeprefix(f"{name}."): value for key, value in tensors.items()}
    packed = as_stored(block)
    for key, value in local.items():
        path, _, leaf = key.rpartition(".")
        module = block.get_submodule(path)
        if path in packed:
            module._buffers[leaf] = value.clone()
        elif leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.float().clone(), requires_grad=False)
        else:
            module._buffers[leaf] = value.float() if value.is_floating_point() else value.clone()
