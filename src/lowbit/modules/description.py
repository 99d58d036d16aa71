"""What a packed linear stores, as a frozen value: its format, its shape, and its transforms and side terms.

A :class:`LinearDescription` says which tensors a layer has, how large they are, and what they mean; with the tensors it is
the layer. Its JSON is one entry of the checkpoint's ``schemes`` (:mod:`lowbit.checkpoints.description`).

Shapes: O output channel, I input channel behind the transforms of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from lowbit.layouts import Layout, packed_layout
from lowbit.modules import serialize_transforms, validation
from lowbit.modules.activation import ActSpec, static_layout
from lowbit.modules.serialize_transforms import PLACES, PartDescription, Place
from lowbit.numerics import Spec, from_dict, nearest, to_dict
from lowbit.transforms import Normalize

_BIAS_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_REQUIRED = ("spec", "shape", "bias", "act", "pre")


@dataclass(frozen=True)
class LinearDescription:
    """A packed linear without its tensors.

    Args:
        spec: the format of the weight.
        shape: ``(O, I)`` of the stored weight.
        bias: the dtype in which the bias is stored; None: the layer has no bias.
        act: how the input is quantized behind ``pre``; None: it is not.
        pre: transforms of the input, in the order they run.
        post: transforms of the output, before the bias, in the order they run.
        side_terms: what is added to the decoded weight.

    Raises:
        ValueError: values that no layer has.
    """

    spec: Spec
    shape: tuple[int, int]
    bias: torch.dtype | None = None
    act: ActSpec | None = None
    pre: tuple[PartDescription, ...] = ()
    post: tuple[PartDescription, ...] = ()
    side_terms: tuple[PartDescription, ...] = ()

    def __post_init__(self):
        if not isinstance(self.spec, Spec) or not isinstance(self.act, ActSpec | None):
            found = f"{self.spec!r:.100} and {self.act!r:.100}"
            raise ValueError(f"a packed linear has a Spec and an ActSpec or none, found {found}")
        validation.check_shape(self.shape)
        if self.bias is not None and self.bias not in _BIAS_DTYPES.values():
            raise ValueError(f"bias is stored as one of {', '.join(_BIAS_DTYPES)} or null, found {self.bias!r}")
        self.spec.check_shape(self.shape)
        if self.act is not None:
            self.act.spec.check_shape((1, self.shape[1]))
        self.layout()
        validation.check_parts(self)

    def parts(self, place: Place) -> tuple[PartDescription, ...]:
        """The transforms or side terms at ``place``."""
        return {"pre": self.pre, "post": self.post, "side": self.side_terms}[place]

    def layout(self) -> Layout:
        """Shape and dtype of each stored tensor, by buffer name. Allocates nothing."""
        buffers = packed_layout(self.spec, self.shape) | static_layout(self.act, self.shape[1])
        for place in PLACES:
            buffers |= serialize_transforms.layout(place, self.parts(place))
        if self.bias is not None:
            buffers["bias"] = (self.shape[0],), self.bias
        return buffers

    @property
    def stored_bits(self) -> int:
        """Bits of everything stored (transforms, side terms and static activation parameters included) but the bias, which
        is stored the same without quantization."""
        sizes = (dtype.itemsize * prod(shape) for name, (shape, dtype) in self.layout().items() if name != "bias")
        return 8 * sum(sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, the bias included."""
        return sum(dtype.itemsize * prod(shape) for shape, dtype in self.layout().values())

    @property
    def is_affine(self) -> bool:
        """Whether the layer's output is an affine function of the input that its weight reads, so that one weight and one
        bias stand for it; not where it normalizes its output."""
        return all(part.type != Normalize.__name__ for part in self.post)

    @property
    def features(self) -> tuple[int, int]:
        """``(in, out)`` as the rest of the model sees the layer: before transforms that change the width of the input."""
        width = self.shape[1]
        for part in reversed(self.pre):
            for name, info in part.tensors().items():
                if name in ("counts", "groups"):  # one for each channel that a Split or a Merge reads
                    width = info.shape[0]
        return width, self.shape[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads. ``post`` and ``side`` are there only where the layer has some."""
        data: dict[str, Any] = {
            "spec": to_dict(self.spec),
            "shape": list(self.shape),
            "bias": None if self.bias is None else str(self.bias).removeprefix("torch."),
            "act": to_dict(self.act),
        }
        for place in PLACES:
            if (parts := self.parts(place)) or place == "pre":
                data[place] = [part.to_json() for part in parts]
        return data

    @classmethod
    def from_json(cls, data: Any) -> LinearDescription:
        """The description that :meth:`to_json` wrote, or a version of lowbit that had no ``post`` and ``side`` yet.

        Raises:
            ValueError: data that describe no layer.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a packed linear is described by an object, found {data!r:.100}")
        if missing := set(_REQUIRED) - data.keys():
            raise ValueError(f"the description of a packed linear lacks {', '.join(sorted(missing))}")
        for key in data.keys() - {*_REQUIRED, *PLACES}:
            hint = nearest(str(key)[:100], [*{*_REQUIRED, *PLACES}])
            raise ValueError(f"the description of a packed linear has an unknown entry {key!r:.100}{hint}")
        bias, shape = data["bias"], data["shape"]
        if bias is not None and (not isinstance(bias, str) or bias not in _BIAS_DTYPES):
            raise ValueError(f"bias is stored as one of {', '.join(_BIAS_DTYPES)} or null, found {bias!r:.100}")
        if not isinstance(shape, list | tuple):
            raise ValueError(f"the shape of a packed linear is two sizes, found {shape!r:.100}")
        parts = {}
        for place in PLACES:
            entries = data.get(place, ())
            if not isinstance(entries, list | tuple):
                raise ValueError(f"{place} of a packed linear is a list, found {entries!r:.100}")
            parts[place] = tuple(PartDescription.from_json(place, entry) for entry in entries)
        return cls(
            spec=from_dict(data["spec"], Spec),
            shape=tuple(shape),  # pyright: ignore[reportArgumentType]  # its length is checked by the class
            bias=None if bias is None else _BIAS_DTYPES[bias],
            act=from_dict(data["act"], ActSpec | None),
            pre=parts["pre"],
            post=parts["post"],
            side_terms=parts["side"],
        )
