"""A table for a model that has none: blocks and linears found by structure alone.

This suffices for methods that change only weights. Modules do not show which linears share an input or which transforms
commute, so each linear stands alone, there are no edges, and `warnings` says what is missing. Blocks may be of several
classes (attention, state space, convolution); a role is a path, and a block has the roles of its own linears.
"""

from __future__ import annotations

import re
from functools import cache

from torch import nn

from lowbit.architectures.decoder import LINEAR_TYPES, blocks_path
from lowbit.architectures.experts import source_of
from lowbit.architectures.table import Architecture, LinearRole, SharedInput

_NOT_AVAILABLE = (
    "channel transforms (scale, shift, permute, rotate) are not available.",
    "linears that read one input are calibrated one by one, because which ones do is not known.",
)
_READ = re.compile(  # a weight that is multiplied or changed without a call of its module; its dtype, device and shape are not
    r"self\.(\w+)\.weight\s*@|@\s*self\.(\w+)\.weight|linear\([^()]*self\.(\w+)\.weight"
    r"|self\.(\w+)\.weight\.(?!dtype|device|shape|data\.clamp_)"
)


def discover(model: nn.Module) -> Architecture:
    """A table from the modules of `model`, whose experts must be unfused; meta tensors are enough.

    The blocks are the decoder's own list. The role of a linear is its path in the block with `*` for numbers. A linear that
    scores the experts in a list next to it counts as their router. A linear whose weight is read without calling it, or
    whose class computes more than a product, stays as it is.

    Raises:
        ValueError: the blocks are not known.
    """
    path = blocks_path(model)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    names = {name: None for block in blocks for name in _linear_patterns(block)}
    routers = {name: None for block in blocks for name in _router_patterns(block)}
    kept = {name: None for block in blocks for name in _kept_patterns(block) if name not in routers}
    roles = tuple(LinearRole(name, name) for name in names if name not in routers and name not in kept)
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return Architecture(
        name=f"discovered {model_type}",
        model_types=(model_type,),
        blocks=path,
        linears=roles,
        shared_inputs=tuple(SharedInput(role.role, (role.role,)) for role in roles),
        routers=tuple(LinearRole(name, name) for name in routers),
        kept=tuple(kept),
        embed=_path_of(model, "get_input_embeddings"),
        head=next(iter(_path_of(model, "get_output_embeddings")), None),
        warnings=tuple(f"No architecture table for model type {model_type!r}: {what}" for what in _NOT_AVAILABLE),
        apart=_why_not_apart(blocks),
    )


def _why_not_apart(blocks: nn.ModuleList) -> str:
    shared = [i for i, block in enumerate(blocks) for m in block.modules() if getattr(m, "is_kv_shared_layer", False)]
    return f"blocks {shared[0]} to {shared[-1]} attend to keys and values of earlier blocks" if shared else ""


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _linear_patterns(block: nn.Module) -> list[str]:
    return [_pattern(path) for path, module in block.named_modules() if isinstance(module, LINEAR_TYPES)]


def _router_patterns(block: nn.Module) -> list[str]:
    """Linears next to a list of experts with one output, or one for each expert."""
    return [
        _pattern(f"{path}.{name}" if path else name)
        for path, parent in block.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and any(child.out_features in (1, len(m)) for m in parent.children() if isinstance(m, nn.ModuleList) and len(m))
    ]


def _kept_patterns(block: nn.Module) -> list[str]:
    """Linears that answer with something else than their product, and those whose weight is read from outside."""
    own = [p for p, m in block.named_modules() if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward]
    return [_pattern(path) for path in own] + [
        _pattern(f"{path}.{name}" if path else name)
        for path, parent in block.named_modules()
        for name in _read_weights(type(parent))
        if isinstance(getattr(parent, name, None), LINEAR_TYPES)
    ]


@cache
def _read_weights(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the submodules whose weight the code of a class reads itself."""
    return tuple(dict.fromkeys(name for match in _READ.findall(source_of(kind)) for name in match if name))


def _path_of(model: nn.Module, getter: str) -> tuple[str, ...]:
    """The path of the module that the model's getter returns; empty if there is none."""
    wanted = getattr(model, getter, lambda: None)()
    return tuple(path for path, module in model.named_modules() if module is wanted)[:1]
