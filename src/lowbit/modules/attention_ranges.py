"""Static ranges of attention's operands: what calibration has found, kept with the module that attends.

Shapes: H query head, G key and value head, R query heads that share one of them, C cluster, D channel of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.modules import serialize_transforms
from lowbit.modules.validation import check_finite, check_positive
from lowbit.numerics import Affine

if TYPE_CHECKING:
    from lowbit.modules.attention import AttentionSpec


def mapped(params: Affine, change: Callable[[Tensor], Tensor]) -> Affine:
    """``change`` of the scales, and of the zero points where there are some."""
    return Affine(change(params.scale), None if params.zero is None else change(params.zero))


class HeadRanges(NamedTuple):
    """Of one key-value head, and of the R query heads that share it.

    Attributes:
        query, key, value: parameters ``[R, C]``, ``[1, C]`` and ``[1, C]``, float32.
        labels, value_labels: the cluster of each channel ``[D]`` of queries and keys, and of values.
        clusters: the channels of queries and keys in each cluster.
    """

    query: Affine
    key: Affine
    value: Affine
    labels: Tensor | None
    value_labels: Tensor | None
    clusters: tuple[Tensor | slice, ...]

    def at_channels(self, params_NC: Affine, *, of_values: bool = False) -> Affine:
        """Parameters of every channel ``[N, D]``, or ``[N, 1]`` where one serves all."""
        labels = self.value_labels if of_values else self.labels
        return params_NC if labels is None else mapped(params_NC, lambda p: p[:, labels])


class OperandRanges(nn.Module):
    """The buffers of static ranges in the formats of ``spec``, whose heads are known.

    ``query_scale``, ``key_scale``, ``value_scale``: float32 ``[H, C]``, ``[G, C]``, ``[G, C]``, or all ``[1, 1]`` where one
    range serves all heads; ``query_zero`` and so on: uint8, where there are zero points. ``labels``, ``value_labels``: uint8
    ``[G, D]``, the cluster of each channel, where there are several. They keep their dtypes, whatever the model is cast to.
    """

    query_scale: Tensor
    key_scale: Tensor
    value_scale: Tensor

    def __init__(self, spec: AttentionSpec, device: torch.device | str | None = None):
        super().__init__()
        assert spec.static and spec.heads is not None
        query, shared, width, value_width = spec.heads
        self.heads, self.most_code = spec.heads, 2**spec.bits - 1
        for name, heads, channels in (
            ("query", query, width),
            ("key", shared, width),
            ("value", shared, value_width),
        ):
            shape = (1, 1) if spec.clusters is None else (heads, min(spec.clusters, channels))
            self.register_buffer(f"{name}_scale", torch.ones(shape, dtype=torch.float32, device=device))
            if not spec.symmetric:
                self.register_buffer(f"{name}_zero", torch.zeros(shape, dtype=torch.uint8, device=device))
        if spec.clusters is not None and spec.clusters > 1:
            for name, channels in (("labels", width), ("value_labels", value_width)):
                self.register_buffer(name, torch.zeros(shared, channels, dtype=torch.uint8, device=device))

    @torch.no_grad()
    def fill(self, buffers: Mapping[str, Tensor]) -> None:
        """Sets buffers by name; each must have the shape of the one that is there."""
        for name, value in buffers.items():
            self.get_buffer(name).copy_(value)

    def check(self, path: str) -> None:
        """Checks that scales are positive and finite, zero points are codes, and clusters are those that there are.

        Args:
            path: of this module, for the message.

        Raises:
            ValueError: a buffer that is not so.
        """
        for name, buffer in self._buffers.items():
            assert buffer is not None
            if name.endswith("_scale"):
                check_finite(f"tensor {path}.{name}", buffer)
                check_positive(f"tensor {path}.{name}", buffer)
            else:
                most = self.most_code if name.endswith("_zero") else self._clusters(name) - 1
                if int(buffer.max()) > most:
                    raise ValueError(f"tensor {path}.{name} holds {int(buffer.max())}, expected 0 to {most}")

    def _clusters(self, name: str) -> int:
        return (self.value_scale if name == "value_labels" else self.key_scale).shape[1]

    def of_head(self, g: int) -> HeadRanges:
        """What key-value head ``g`` and its query heads have."""
        shared = self.heads[0] // self.heads[1]

        def params(name: str, rows: slice) -> Affine:
            scale, zero = self.get_buffer(f"{name}_scale"), self._buffers.get(f"{name}_zero")
            if len(scale) == 1:  # one range, or one head
                rows = slice(None)
            picked = scale[rows]
            if name == "query":
                picked = picked.expand(shared, -1)
            at = None if zero is None else zero[rows].float().expand(len(picked), -1)
            return Affine(picked, at)

        labels, value_labels = (
            None if buffer is None else buffer[g].long()
            for buffer in (self._buffers.get("labels"), self._buffers.get("value_labels"))
        )
        count = self.key_scale.shape[1]
        clusters: tuple[Tensor | slice, ...] = (slice(None),)
        if labels is not None:
            clusters = tuple((labels == c).nonzero()[:, 0] for c in range(count))
        query = params("query", slice(g * shared, (g + 1) * shared))
        return HeadRanges(
            query, params("key", slice(g, g + 1)), params("value", slice(g, g + 1)), labels, value_labels, clusters
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OperandRanges:
        return super()._apply(serialize_transforms.keeping_dtype(fn), recurse)
