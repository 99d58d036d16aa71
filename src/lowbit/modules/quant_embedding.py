"""A packed embedding: rows of a table, decoded when their tokens are looked up.

The output head of many models is the same table. It is stored once: :meth:`QuantEmbedding.head` is a packed linear around
the embedding's own buffers.

Shapes: V vocabulary, H channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import kernels
from lowbit.layouts import pack_qtensor
from lowbit.modules import serialize_transforms
from lowbit.modules.description import LinearDescription
from lowbit.modules.quant_linear import QuantLinear
from lowbit.modules.validation import check_tensors
from lowbit.numerics import QTensor


class QuantEmbedding(nn.Module):
    """A packed table ``[V, H]`` with parameters for each row. Build it with :meth:`from_qtensor` or :meth:`empty`.

    Args:
        description: of the table as a linear of ``V`` outputs; without bias, transforms and activation format.
        buffers: tensors by name, laid out as ``description.layout()`` says.
        dtype: of the vectors looked up. Casts of the module change it, and never the packed buffers.
        factor: a constant that multiplies them, as some models have it.

    Raises:
        ValueError: rows that share parameters, or parts that a table does not have.
    """

    def __init__(
        self, description: LinearDescription, buffers: Mapping[str, Tensor], dtype: torch.dtype, factor: float = 1.0
    ):
        super().__init__()
        check_table(description)
        self.description, self.factor = description, factor
        self.num_embeddings, self.embedding_dim = description.shape
        for name in description.layout():
            self.register_buffer(name, buffers[name])
        device = next(iter(buffers.values())).device
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_qtensor(cls, q: QTensor, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> QuantEmbedding:
        """Packs ``q`` ``[V, H]``."""
        return cls(LinearDescription(q.spec, (q.shape[0], q.shape[1])), pack_qtensor(q), dtype, factor)

    @classmethod
    def empty(
        cls,
        description: LinearDescription,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
        factor: float = 1.0,
    ) -> QuantEmbedding:
        """The described table, its buffers without content: for loading."""
        layout = description.layout()
        buffers = {n: torch.empty(s, dtype=kind, device=device) for n, (s, kind) in layout.items()}
        return cls(description, buffers, dtype, factor)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[...]`` to vectors ``[..., H]`` in the module's dtype.

        Raises:
            IndexError: an id outside of the vocabulary.
        """
        rows = {name: buffer[ids.reshape(-1)] for name, buffer in self.packed().items()}
        x = kernels.decode_packed(rows, self.description.spec, (ids.numel(), self.embedding_dim)).to(self.like.dtype)
        x = x.view(*ids.shape, self.embedding_dim)
        return x if self.factor == 1.0 else x * torch.tensor(self.factor, dtype=x.dtype)

    def head(self) -> QuantLinear:
        """The table as a linear ``H`` to ``V`` around the same buffers, which it does not store."""
        return QuantLinear(self.description, self.packed()).tied()

    @property
    def weight(self) -> Tensor:
        """The table ``[V, H]`` in the module's dtype, decoded at each access; it is not a parameter."""
        table = kernels.decode_packed(self.packed(), self.description.spec, self.description.shape)
        return table.to(self.like.dtype)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None and name != "like"}

    def check(self, name: str) -> None:
        """Checks the values of the stored tensors of the embedding ``name``. Raises ValueError."""
        try:
            check_tensors(self.description, self.packed())
        except ValueError as error:
            raise ValueError(f"tensor {name}.{error}") from error

    def extra_repr(self) -> str:
        bits = self.description.stored_bits / (self.num_embeddings * self.embedding_dim)
        return f"{self.num_embeddings}, {self.embedding_dim}, {bits:.3f} bits per weight"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        like = self.like
        super()._apply(serialize_transforms.keeping_dtype(fn), recurse)
        self.like = fn(like)
        return self


def scale_of(module: nn.Module) -> float | None:
    """The constant that multiplies the vectors of an embedding, or None for a module that is more than a table."""
    if type(module).forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return float(scale) if isinstance(module, nn.Embedding) and isinstance(scale, int | float) else None


def check_table(description: LinearDescription) -> None:
    """Raises ValueError unless ``description`` is that of a table whose rows can be decoded one by one."""
    rows = description.shape[0]
    if description.bias or description.act or description.pre or description.post or description.side_terms:
        raise ValueError(
            "a packed embedding has codes and their parameters only; found bias, transforms or activations"
        )
    for name, (shape, _) in description.layout().items():
        if len(shape) != 2 or shape[0] != rows:
            raise ValueError(f"a packed embedding has parameters for each row; its {name} are {list(shape)}")
