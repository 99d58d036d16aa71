"""Where a rotated residual stream begins and ends: two hooks, on the first block and on the last.

Between the two every block works in the rotated basis; its weights were folded (:mod:`lowbit.architectures.residual`).
Folding the two ends as well, into embeddings and head, would save two products of a few thousand multiplications a token and
cost a second copy of the embeddings wherever head and embeddings are one matrix, and rounding them anew everywhere. As hooks
they work for whatever lies before and behind the blocks: positions, scaled embeddings, projections.

A rotation is a seed, or it was learned: then its matrix is stored, as a submodule of the first block.

Hidden states that a caller asks for between the blocks (``output_hidden_states``) are in the rotated basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.modules import serialize_transforms
from lowbit.modules.validation import check_finite, check_orthogonal
from lowbit.transforms import Kronecker, RandomHadamard, Rotate, Seeded

RESIDUAL = "lowbit_residual"
"""The submodule of the first block that holds a stored rotation."""


@dataclass(frozen=True)
class StoredRotation:
    """A rotation of ``size`` channels whose matrix the model stores (:class:`ResidualMatrix`), because no seed makes it."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a rotation has a size of at least 1, found {self.size}")


_KINDS: dict[str, type[Seeded | StoredRotation]] = {c.__name__: c for c in (Kronecker, RandomHadamard, StoredRotation)}


def turned(x: Tensor, rotation: Seeded | Rotate) -> Tensor:
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
    rotation: Seeded | StoredRotation

    @property
    def tensor(self) -> str | None:
        """The name of the stored matrix in a checkpoint; None: there is none."""
        return f"{self.blocks}.0.{RESIDUAL}.rotation" if isinstance(self.rotation, StoredRotation) else None

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads."""
        kind, rotation = type(self.rotation).__name__, self.rotation
        seed = {"seed": rotation.seed} if isinstance(rotation, Seeded) else {}
        return {"type": kind, **seed, "size": rotation.size, "blocks": self.blocks}

    @classmethod
    def from_json(cls, data: Any) -> ResidualRotation:
        """The rotation that :meth:`to_json` wrote.

        Raises:
            ValueError: data that describe no rotation.
        """
        kind = _KINDS.get(str(data.get("type"))) if isinstance(data, Mapping) else None
        numbers = ("size",) if kind is StoredRotation else ("seed", "size")
        if kind is None or set(data) != {"type", "blocks", *numbers}:
            raise ValueError(
                f"a rotation of the residual stream has a type ({', '.join(_KINDS)}), size, blocks and, unless it is stored, a seed, "
                f"found {data!r:.100}"
            )
        if not all(type(data[key]) is int for key in numbers) or not isinstance(data["blocks"], str):
            raise ValueError(f"the rotation of the residual stream is damaged: {data!r:.100}")
        return cls(data["blocks"], kind(*(data[key] for key in numbers)))


class ResidualMatrix(nn.Module):
    """The stored rotation: ``rotation`` ``[d, d]`` float32, orthogonal; a stream ``h`` becomes ``h @ rotation``.

    It begins as the identity and keeps its dtype, whatever the model is cast to.
    """

    def __init__(self, size: int, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("rotation", torch.eye(size, device=device, dtype=torch.float32))

    def check(self, path: str) -> None:
        """Raises ValueError if the matrix is not finite and orthogonal. ``path``: of this module, for the message."""
        name = f"tensor {path}.rotation"
        check_finite(name, self.get_buffer("rotation"))
        check_orthogonal(name, self.get_buffer("rotation"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualMatrix:
        return super()._apply(serialize_transforms.keeping_dtype(fn), recurse)


def hold_residual(block: nn.Module, size: int) -> ResidualMatrix:
    """Gives a model's first block a place for a stored rotation of ``size`` channels."""
    device = next((tensor.device for tensor in (*block.parameters(), *block.buffers())), None)
    matrix = ResidualMatrix(size, device)
    block.add_module(RESIDUAL, matrix)
    return matrix


_Turn = Callable[[], Seeded | Rotate]


@dataclass(frozen=True)
class _Enter:
    rotation: _Turn
    residual: ResidualRotation | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (turned(args[0], self.rotation()), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": turned(kwargs["hidden_states"], self.rotation())}


@dataclass(frozen=True)
class _Leave:
    rotation: _Turn

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return turned(output[0], self.rotation().inverse()), *output[1:]
        return turned(output, self.rotation().inverse())


@dataclass(frozen=True, eq=False)
class _Held:
    """The rotation that a module stores, as it is when it is asked for. A class and no function: a model is copied with its hooks."""

    matrix: ResidualMatrix

    def __call__(self) -> Rotate:
        return Rotate(self.matrix.get_buffer("rotation"))


@dataclass(frozen=True)
class _Made:
    rotation: Seeded

    def __call__(self) -> Seeded:
        return self.rotation


@contextmanager
def turning(first: nn.Module, last: nn.Module, rotation: _Turn) -> Iterator[None]:
    """While open, what enters the block ``first`` is turned by ``rotation()``, and what leaves ``last`` is turned back; gradients
    reach the rotation."""
    hooks = (
        first.register_forward_pre_hook(_Enter(rotation), with_kwargs=True),
        last.register_forward_hook(_Leave(rotation)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def turn_residual(model: nn.Module, residual: ResidualRotation) -> None:
    """Turns what enters the first of the blocks by the rotation, and what leaves the last back. A stored rotation gets its place,
    as the identity.

    Raises:
        ValueError: the model has no such blocks, or its stream has another width than the rotation.
    """
    listed = model.get_submodule(residual.blocks)
    if not isinstance(listed, nn.ModuleList) or not len(listed):
        raise ValueError(f"the residual stream is rotated between {residual.blocks!r}, which is not a list of blocks")
    config: Any = getattr(model, "config", None)
    width = None if config is None else config.get_text_config().hidden_size
    size = residual.rotation.size
    if width is not None and size != width:
        raise ValueError(f"the rotation of the residual stream has the size {size}, the stream has {width} channels")
    stored = isinstance(residual.rotation, StoredRotation)
    rotation = _Held(hold_residual(listed[0], size)) if stored else _Made(residual.rotation)  # pyright: ignore[reportArgumentType]
    listed[0].register_forward_pre_hook(_Enter(rotation, residual), with_kwargs=True)
    listed[-1].register_forward_hook(_Leave(rotation))


def residual_of(model: nn.Module) -> ResidualRotation | None:
    """What :func:`turn_residual` did to a model; None where it did nothing."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Enter) and hook.residual is not None:
                return hook.residual
    return None
