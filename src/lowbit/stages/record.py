"""What the walk keeps of a finished block: a record in the journal, and how its tensors become a block again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lowbit.modules import AttentionSpec, LinearDescription, OperandRanges, QuantLinear
from lowbit.numerics import from_dict, to_dict
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
            **({"latents": self.latents} if self.latents else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRecord:
        layers = [LayerRecord(**{**layer, "notes": tuple(layer["notes"])}) for layer in data["layers"]]
        modules = {name: LinearDescription.from_json(each) for name, each in data["modules"].items()}
        attention = {name: from_dict(spec) for name, spec in data["attention"].items()}
        return cls(**{**data, "layers": layers, "modules": modules, "attention": attention})


def install_packed(
    block: nn.Module, name: str, modules: dict[str, LinearDescription], tensors: dict[str, Tensor]
) -> None:
    """Puts packed linears and stored tensors (names with prefix ``name``) into an original block, in place."""
    for full, description in modules.items():
        block.set_submodule(full.removeprefix(f"{name}."), QuantLinear.empty(description))
    local = {key.removeprefix(f"{name}."): value for key, value in tensors.items()}
    packed = {path for path, module in block.named_modules() if isinstance(module, QuantLinear | OperandRanges)}
    for key, value in local.items():
        path, _, leaf = key.rpartition(".")
        module = block.get_submodule(path)
        if path in packed:
            module._buffers[leaf] = value.clone()
        elif leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.float().clone(), requires_grad=False)
        else:
            module._buffers[leaf] = value.float() if value.is_floating_point() else value.clone()
