"""A table for a model that has none: blocks and linears found by structure alone.

This suffices for methods that change only weights. Modules do not show which linears share an input or which transforms
commute, so each linear stands alone, there are no edges, and `warnings` says what is missing.
"""

from __future__ import annotations

import re

from torch import nn

from lowbit.architectures.resolve import LINEAR_TYPES
from lowbit.architectures.table import Architecture, LinearRole, SharedInput

_NOT_AVAILABLE = (
    "channel transforms (scale, shift, permute, rotate) are not available.",
    "linears that read one input are calibrated one by one, because which ones do is not known.",
)


def discover(model: nn.Module) -> Architecture:
    """A table from the modules of `model`, whose experts must be unfused; meta tensors are enough.

    The blocks are the longest ModuleList of one class that holds linears. The role of a linear is its path in the block
    with `*` for numbers. A linear next to a list of experts counts as their router and not as quantizable.

    Raises:
        ValueError: there is no such ModuleList.
    """
    path, blocks = _longest_block_list(model)
    names = {name: None for block in blocks for name in _linear_patterns(block)}
    routers = {name: None for block in blocks for name in _router_patterns(block)}
    roles = tuple(LinearRole(name, name) for name in names if name not in routers)
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return Architecture(
        name=f"discovered {model_type}",
        model_types=(model_type,),
        blocks=path,
        linears=roles,
        shared_inputs=tuple(SharedInput(role.role, (role.role,)) for role in roles),
        routers=tuple(LinearRole(name, name) for name in routers),
        embed=_path_of(model, "get_input_embeddings"),
        head=next(iter(_path_of(model, "get_output_embeddings")), None),
        warnings=tuple(f"No architecture table for model type {model_type!r}: {what}" for what in _NOT_AVAILABLE),
    )


def _longest_block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(isinstance(inner, LINEAR_TYPES) for inner in module.modules())
    }
    outermost = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    if not outermost:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList of like blocks with linears, so its blocks cannot be "
            "discovered; add an architecture table for it."
        )
    return max(outermost.items(), key=lambda item: len(item[1]))


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _linear_patterns(block: nn.Module) -> list[str]:
    return [_pattern(path) for path, module in block.named_modules() if isinstance(module, LINEAR_TYPES)]


def _router_patterns(block: nn.Module) -> list[str]:
    return [
        _pattern(f"{path}.{name}" if path else name)
        for path, parent in block.named_modules()
        if any(isinstance(child, nn.ModuleList) for child in parent.children())
        for name, child in parent.named_children()
        if isinstance(child, LINEAR_TYPES)
    ]


def _path_of(model: nn.Module, getter: str) -> tuple[str, ...]:
    """The path of the module that the model's getter returns; empty if there is none."""
    wanted = getattr(model, getter, lambda: None)()
    return tuple(path for path, module in model.named_modules() if module is wanted)[:1]
