"""Where a rotated residual stream begins and ends: two hooks, on the first block and on the last.

Between the two every block works in the rotated basis; its weights were folded (:mod:`lowbit.architectures.residual`).
Folding the two ends as well, into embeddings and head, would save two products of a few thousand multiplications a token and
cost a second copy of the embeddings wherever head and embeddings are one matrix, and rounding them anew everywhere. As hooks
they work for whatever lies before and behind the blocks: positions, scaled embeddings, projections.

Hidden states that a caller asks for between the blocks (``output_hidden_states``) are in the rotated basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.transforms import Kronecker, RandomHadamard, Seeded

_KINDS: dict[str, type[Seeded]] = {cls.__name__: cls for cls in (Kronecker, RandomHadamard)}


def turned(x: Tensor, rotation: Seeded) -> Tensor:
    """``x`` ``[..., d]`` rotated, in its dtype; computed in float32 (float64 stays)."""
    return rotation.forward(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


@dataclass(frozen=True)
class ResidualRotation:
    """The rotation of a model's residual stream.

    Args:
        blocks: the path of the list of blocks between whose ends the stream is rotated.
        rotation: what turns the stream, not inverted.
    """

    blocks: str
    rotation: Seeded

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads."""
        kind, rotation = type(self.rotation).__name__, self.rotation
        return {"type": kind, "seed": rotation.seed, "size": rotation.size, "blocks": self.blocks}

    @classmethod
    def from_json(cls, data: Any) -> ResidualRotation:
        """The rotation that :meth:`to_json` wrote.

        Raises:
            ValueError: data that describe no rotation.
        """
        kind = _KINDS.get(str(data.get("type"))) if isinstance(data, Mapping) else None
        if kind is None or set(data) != {"type", "seed", "size", "blocks"}:
            raise ValueError(
                f"a rotation of the residual stream has a type ({', '.join(_KINDS)}), seed, size and blocks, "
                f"found {data!r:.100}"
            )
        if not all(type(data[key]) is int for key in ("seed", "size")) or not isinstance(data["blocks"], str):
            raise ValueError(f"the rotation of the residual stream is damaged: {data!r:.100}")
        return cls(data["blocks"], kind(data["seed"], data["size"]))


@dataclass(frozen=True)
class _Enter:
    residual: ResidualRotation

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (turned(args[0], self.residual.rotation), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": turned(kwargs["hidden_states"], self.residual.rotation)}


@dataclass(frozen=True)
class _Leave:
    rotation: Seeded

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return turned(output[0], self.rotation.inverse()), *output[1:]
        return turned(output, self.rotation.inverse())


def turn_residual(model: nn.Module, residual: ResidualRotation) -> None:
    """Turns what enters the first of the blocks by the rotation, and what leaves the last back.

    Raises:
        ValueError: the model has no such blocks, or its stream has another width than the rotation.
    """
    listed = model.get_submodule(residual.blocks)
    if not isinstance(listed, nn.ModuleList) or not len(listed):
        raise ValueError(f"the residual stream is rotated between {residual.blocks!r}, which is not a list of blocks")
    config: Any = getattr(model, "config", None)
    width = None if config is None else config.get_text_config().hidden_size
    if width is not None and residual.rotation.size != width:
        raise ValueError(
            f"the rotation of the residual stream has the size {residual.rotation.size}, the stream has {width} channels"
        )
    listed[0].register_forward_pre_hook(_Enter(residual), with_kwargs=True)
    listed[-1].register_forward_hook(_Leave(residual.rotation))


def residual_of(model: nn.Module) -> ResidualRotation | None:
    """What :func:`turn_residual` did to a model; None where it did nothing."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Enter):
                return hook.residual
    return None
