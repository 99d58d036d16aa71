"""What calibration has found of a layer's cache: the coordinates in which its keys and values are quantized, or their range.

Kept with the module that attends, so that it is saved, loaded and moved with the model. A key ``k`` of a head is stored as
``((k - shift) / scale) @ rotation``, see :class:`lowbit.caches.Coordinates`.

Shapes: G key-value head, D channel of a key or of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.modules import serialize_transforms
from lowbit.modules.validation import check_finite, check_orthogonal, check_positive
from lowbit.numerics import serializable

CALIBRATION = "lowbit_cache"
"""The submodule of an attention module that holds the calibration of its cache."""
BUFFERS = (
    "key_rotation", "key_scale", "key_shift", "key_range",
    "value_rotation", "value_scale", "value_shift", "value_range",
)  # fmt: skip


@serializable
@dataclass(frozen=True)
class CalibrationSpec:
    """Which buffers a layer's calibration has, and their sizes.

    Args:
        heads: key-value heads, and channels of a key and of a value.
        buffers: their names, of :data:`BUFFERS`.

    Raises:
        ValueError: other names, or sizes that no heads have.
    """

    heads: tuple[int, int, int]
    buffers: tuple[str, ...]

    def __post_init__(self):
        if len(self.heads) != 3 or not all(type(size) is int and 0 < size <= 2**16 for size in self.heads):
            raise ValueError(
                f"heads of a cache are their number and the channels of keys and values, found {self.heads!r:.100}"
            )
        if not self.buffers or self.buffers != tuple(name for name in BUFFERS if name in self.buffers):
            raise ValueError(
                f"the calibration of a cache has some of {', '.join(BUFFERS)}, in this order; found {self.buffers!r:.200}"
            )

    @classmethod
    def of(cls, buffers: Iterable[str], heads: tuple[int, int, int]) -> CalibrationSpec:
        """With ``buffers`` in their order."""
        named = set(buffers)
        return cls(heads, (*(name for name in BUFFERS if name in named), *sorted(named.difference(BUFFERS))))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a buffer: ``[G, D, D]`` of rotations, ``[G, D]`` of scales and shifts, ``[G, 2]`` of ranges."""
        count, key, value = self.heads
        dim = key if name.startswith("key") else value
        if name.endswith("range"):
            return count, 2
        return (count, dim, dim) if name.endswith("rotation") else (count, dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(4 * torch.Size(self.shape(name)).numel() for name in self.buffers)


class CacheCalibration(nn.Module):
    """The buffers of ``spec``, float32: ``key_rotation`` (orthogonal), ``key_scale`` (positive), ``key_shift``, ``key_range`` (lowest
    and highest number), and the same of values.

    They begin as coordinates that change nothing and ranges from -1 to 1, and keep their dtype, whatever the model is cast to.
    """

    def __init__(self, spec: CalibrationSpec, device: torch.device | str | None = None):
        super().__init__()
        self.spec = spec
        for name in spec.buffers:
            shape = spec.shape(name)
            if name.endswith("rotation"):
                start = torch.eye(shape[-1], device=device).expand(shape).clone()
            elif name.endswith("scale"):
                start = torch.ones(shape, device=device)
            elif name.endswith("range"):
                start = torch.tensor([-1.0, 1.0], device=device).expand(shape).clone()
            else:
                start = torch.zeros(shape, device=device)
            self.register_buffer(name, start.to(torch.float32))

    @torch.no_grad()
    def fill(self, buffers: Mapping[str, Tensor]) -> None:
        """Sets buffers by name; each must have the shape of the one that is there."""
        for name, value in buffers.items():
            buffer = self.get_buffer(name)
            if value.shape != buffer.shape:
                raise ValueError(f"{name} of a cache is {list(value.shape)}, expected {list(buffer.shape)}")
            buffer.copy_(value)

    def check(self, path: str) -> None:
        """Checks that all buffers are finite, scales positive, rotations orthogonal, and that ranges end where they begin or above.

        Args:
            path: of this module, for the message.

        Raises:
            ValueError: a buffer that is not so.
        """
        for name, buffer in self._buffers.items():
            assert buffer is not None
            where = f"tensor {path}.{name}"
            check_finite(where, buffer)
            if name.endswith("scale"):
                check_positive(where, buffer)
            if name.endswith("range") and not bool((buffer[:, 0] <= buffer[:, 1]).all()):
                raise ValueError(f"{where} has a range that ends below its begin, found {buffer.tolist()!r:.100}")
            if name.endswith("rotation"):
                check_orthogonal(where, buffer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CacheCalibration:
        return super()._apply(serialize_transforms.keeping_dtype(fn), recurse)


def calibrate_cache(module: nn.Module, spec: CalibrationSpec | None) -> CacheCalibration | None:
    """Gives an attention module a calibration of its cache that changes nothing yet, or takes it away (None)."""
    if CALIBRATION in module._modules:
        delattr(module, CALIBRATION)
    if spec is None:
        return None
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    made = CacheCalibration(spec, device)
    module.add_module(CALIBRATION, made)
    return made


def cache_calibration(module: nn.Module) -> CacheCalibration | None:
    """The calibration of an attention module's cache; None: it has none."""
    found = module._modules.get(CALIBRATION)
    return found if isinstance(found, CacheCalibration) else None


def calibrations(model: nn.Module) -> Iterator[tuple[str, Any, CacheCalibration]]:
    """Of every attention module that has one: its path, the module and its calibration."""
    for path, module in model.named_modules():
        if (found := cache_calibration(module)) is not None:
            yield path, module, found
