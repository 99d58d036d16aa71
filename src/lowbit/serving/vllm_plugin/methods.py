"""vLLM's layers with packed weights: how their tensors arrive, and how they compute.

vLLM fuses q, k and v, and gate and up, into one layer. Here parts of one format become one packed layer; others stay layers of
their own, whose outputs are joined. A compiled model calls a product as one operator of torch.

Shapes: T token, O output channel, I input channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import (  # pyright: ignore
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from lowbit.modules import LinearDescription, QuantEmbedding, QuantLinear
from lowbit.modules.validation import check_tensors
from lowbit.serving.vllm_plugin.shards import cut, joined

_SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}
"""What vLLM calls the parts of a fused layer beside their numbers."""
_GUARD = "weight"
"""A tensor without values that keeps other readers from taking the checkpoint for an unquantized one."""

_running: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
"""The packed modules of this process, by the names under which the operators find them."""


def announced(prefix: str, module: nn.Module) -> str:
    """Makes ``module`` known to the operators; its name, which is vLLM's ``prefix`` where no other model has taken it."""
    name = prefix
    while name in _running:
        name += "'"
    _running[name] = module
    return name


def product(x: Tensor, name: str, packed: Packed) -> Tensor:
    """``[..., I]`` to ``[..., packed.width]`` through packed layers of this name: at once, or as an operator where vLLM compiles the
    model; the operator's own cost is that of a small product."""
    return packed_product(x, name, packed.width) if torch.compiler.is_compiling() else packed(x)


@torch.library.custom_op("lowbit::packed_product", mutates_args=())
def packed_product(x: Tensor, name: str, width: int) -> Tensor:
    """``[..., I]`` to ``[..., width]`` through the packed layers of a name."""
    return _running[name](x)


@packed_product.register_fake
def _(x: Tensor, name: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("lowbit::packed_rows", mutates_args=())
def packed_rows(ids: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    """Token ids ``[...]`` to vectors ``[..., width]`` of the packed table of a name, which has this dtype."""
    return _running[name](ids)


@packed_rows.register_fake
def _(ids: Tensor, name: str, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, width, dtype=dtype)


class Packed(nn.Module):
    """The packed layers that one layer of vLLM's fuses, in this process.

    Args:
        layers: made when all their tensors are there.
    """

    def __init__(self, layers: list[QuantLinear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.width = sum(layer.out_features for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [layer(x) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class _Arrival:
    """Collects the tensors of packed layers; each layer is cut for this process as soon as it is whole.

    Args:
        described: the layers by their names in the checkpoint, in vLLM's order.
        places: the rows and columns of each that this process holds.
    """

    def __init__(
        self, described: Mapping[str, LinearDescription], places: list[tuple[tuple[int, int], tuple[int, int]]]
    ):
        self.described, self.places = described, places
        self.whole: dict[str, tuple[LinearDescription, dict[str, Tensor]]] = {}
        self._arrived: dict[str, dict[str, Tensor]] = {name: {} for name in described}

    def announce(self, layer: nn.Module) -> None:
        """Gives ``layer`` an empty parameter for each name under which tensors will arrive."""
        dtypes = {_GUARD: torch.uint8}
        for description in self.described.values():
            dtypes |= {name: dtype for name, (_, dtype) in description.layout().items()}
        for name, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._taker(name)  # pyright: ignore[reportAttributeAccessIssue]
            layer.register_parameter(name, parameter)

    def _taker(self, buffer: str) -> Any:
        def take(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
            if buffer == _GUARD and not tensor.numel():
                return
            number = shard if isinstance(shard, int) else _SHARDS[shard]
            name = [*self.described][number]
            description, found = self.described[name], (tuple(tensor.shape), tensor.dtype)
            if description.layout().get(buffer) != found:
                raise ValueError(
                    f"tensor {name}.{buffer} is {found[1]} {list(found[0])}, which config.json does not describe"
                )
            self._arrived[name][buffer] = tensor.clone()  # the shard of the file is let go
            if len(self._arrived[name]) == len(description.layout()):
                try:
                    self.whole[name] = cut(description, self._arrived.pop(name), *self.places[number])
                except ValueError as error:
                    raise ValueError(f"{name} does not run in several processes: {error}") from error

        return take

    def finish(self, layer: nn.Module) -> list[tuple[LinearDescription, dict[str, Tensor]]]:
        """The layers, in order; the empty parameters are gone.

        Raises:
            ValueError: tensors that did not arrive.
        """
        for name, tensors in self._arrived.items():
            missing = [buffer for buffer in self.described[name].layout() if buffer not in tensors]
            raise ValueError(f"tensor {name}.{missing[0]} of a packed layer is not in the checkpoint; it is incomplete")
        for name in {_GUARD, *(b for d in self.described.values() for b in d.layout())}:
            del layer._parameters[name]
        return [self.whole.pop(name) for name in self.described]


class PackedLinear(LinearMethodBase):
    """A linear of vLLM's, of one packed layer or several.

    Args:
        prefix: vLLM's name of it.
        parts: the packed layers by their names in the checkpoint.
    """

    def __init__(self, prefix: str, parts: Mapping[str, LinearDescription]):
        self.prefix, self.parts = prefix, parts

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        # The bias is a parameter of vLLM's own.
        described = {name: replace(description, bias=None) for name, description in self.parts.items()}
        widths = output_partition_sizes if len(described) > 1 else [sum(output_partition_sizes)]
        places = []
        for number, (name, description) in enumerate(described.items()):
            if layer.has_bias != (self.parts[name].bias is not None):
                raise ValueError(f"{name} has a bias in the checkpoint or in vLLM's layer, and not in the other")
            rows, columns = _place(layer, number, description, len(output_partition_sizes) > len(described))
            # Transforms may change the width of the input that a layer reads.
            found = (rows[1] - rows[0], columns[1] - columns[0] + description.features[0] - description.shape[1])
            if found != (widths[number], input_size_per_partition):
                raise ValueError(
                    f"{name} is {list(description.shape)} in the checkpoint, which is not what vLLM's layer has: "
                    f"{widths[number]} outputs and {input_size_per_partition} inputs in a process"
                )
            places.append((rows, columns))
        self._arrival = _Arrival(described, places)
        self._arrival.announce(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        parts = self._arrival.finish(layer)
        for name, part in zip(self.parts, parts, strict=True):
            with _damage_named(name):
                check_tensors(*part)
        layer.packed = Packed([_prepared(self.prefix, *part) for part in joined(parts)])
        self._name = announced(self.prefix, layer.packed)
        del self._arrival

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(x, self._name, layer.packed)
        return y if bias is None else y + bias


def _place(
    layer: Any, number: int, description: LinearDescription, fused: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns of the part ``number`` of ``layer`` that this process holds; ``fused``: of several parts stored as one."""
    high, wide = description.shape
    if layer.tp_size == 1 or isinstance(layer, ReplicatedLinear):
        return (0, high), (0, wide)
    if fused:
        raise ValueError(f"{layer.prefix} is stored as one matrix, which cannot be cut for several processes")
    if isinstance(layer, RowParallelLinear):
        share, rank, alike, size = layer.input_size_per_partition, layer.tp_rank, 1, wide
    else:
        # Keys and values of few heads are in several processes at once.
        alike = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number else 1
        share, rank, size = layer.output_partition_sizes[number], layer.tp_rank // alike, high
    if share * layer.tp_size != size * alike:
        raise ValueError(f"part {number} of {layer.prefix} is {[high, wide]}, of which vLLM gives each process {share}")
    own = (rank * share, (rank + 1) * share)
    return ((0, high), own) if isinstance(layer, RowParallelLinear) else (own, (0, wide))


class PackedEmbedding(LinearMethodBase):
    """A packed table of vLLM's: an embedding, an output head, or both.

    Args:
        name: of the table in the checkpoint.
        description: of the table as a linear of as many outputs as there are tokens.
    """

    def __init__(self, name: str, description: LinearDescription):
        self.name, self.description = name, description

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        high, wide = self.description.shape
        if (layer.org_vocab_size, layer.embedding_dim) != (high, wide) or layer.num_added_embeddings:
            raise ValueError(
                f"{self.name} is {[high, wide]} in the checkpoint, vLLM's table is {[layer.num_embeddings, layer.embedding_dim]}"
            )
        if self.description.bias is not None:
            raise ValueError(f"{self.name} has a bias, which vLLM's output head does not add")
        at = layer.shard_indices
        place = ((at.org_vocab_start_index, at.org_vocab_end_index), (0, wide))
        self._dtype = params_dtype
        self._arrival = _Arrival({self.name: self.description}, [place])
        self._arrival.announce(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        [(description, tensors)] = self._arrival.finish(layer)
        del self._arrival
        layer.table = QuantEmbedding(description, tensors, self._dtype)
        layer.table.check(self.name)
        self._name = announced(self.name, layer.table)
        self._head: Packed | None = None

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return packed_rows(input_, self._name, layer.embedding_dim, self._dtype)

    def head(self, layer: Any) -> Packed:
        """The table as an output head, packed for the kernels when it is first asked for."""
        if self._head is None:
            self._head = Packed([_prepared(self.name, layer.table.description, layer.table.packed())])
        return self._head

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.head(layer)(x)
        if lacking := layer.num_embeddings_per_partition - y.shape[-1]:
            y = F.pad(y, (0, lacking))  # as wide as those of other processes
        return y if bias is None else y + bias


class TiedHead(LinearMethodBase):
    """An output head that is its model's packed embedding, which stores it."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self._table: list[Any] = []

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """None: the embedding has them."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        self._table = [embed_tokens]
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._table:
            raise ValueError(f"{self.prefix} is tied to a packed embedding, and vLLM did not tie them")
        [table] = self._table
        return table.quant_method.apply(table, x, bias)


def _prepared(name: str, description: LinearDescription, tensors: Mapping[str, Tensor]) -> QuantLinear:
    layer = QuantLinear(description, tensors)
    with _damage_named(name):
        layer.prepare()
    return layer


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Says in which layer of the file values are that no layer has."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tensor {name}.{error}; the file is damaged") from error
