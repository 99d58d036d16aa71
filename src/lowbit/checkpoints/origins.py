"""Which tensors of a checkpoint make which parameters of a model.

Names on disk and names in the module tree differ: older checkpoints lack a prefix, mixtures of experts are stored one
expert at a time and held as one 3-D parameter, some projections are stored fused. transformers knows these conversions
and applies them to a whole model at once. Here its rules are applied to names and meta tensors, once, and kept as
`Origin` values, so that the tensors of one block can be read without the rest.

Law: `origin.tensors(model)[name]` equals what `from_pretrained` puts into `name`, for every name.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lowbit.architectures.experts import expert_layout
from lowbit.checkpoints.scaled import ScaledWeight
from lowbit.checkpoints.shards import ModelError, TensorHeader, read_tensor

Stored = TensorHeader | ScaledWeight


@dataclass(frozen=True, eq=False)
class Origin:
    """How one or more parameters are made: checkpoint tensors, and the conversion they pass (None: as stored).

    `first` is the name that the conversion is keyed by. `sources` holds, for each of the conversion's source patterns,
    the names of its checkpoint tensors in order (one an expert, for experts).
    """

    first: str
    converter: WeightConverter | None
    sources: dict[str, tuple[str, ...]]
    headers: dict[str, Stored]

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint tensors read, in order."""
        return tuple(name for group in self.sources.values() for name in group)

    def tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Reads and converts everything: parameter name -> tensor in the stored dtype."""
        return self._convert(model, lambda name: read(self.headers[name]), self.sources)

    def meta(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The same on the meta device, reading nothing: what the parameters' shapes will be."""
        return self._convert(model, lambda name: _meta(self.headers[name]), self.sources)

    @property
    def has_rows(self) -> bool:
        """Whether one row of the leading axis (one expert) can be made without reading the others."""
        if self.converter is None:
            return True
        merge = self.converter.operations[0]
        return isinstance(merge, MergeModulelist) and merge.dim == 0 and len(self.converter.target_patterns) == 1

    def row(self, model: PreTrainedModel, index: int) -> Tensor:
        """One row of the leading axis, reading only what makes it. Needs `has_rows`."""
        assert self.has_rows
        if self.converter is None:
            return read(self.headers[self.first_source], (index, index + 1))[0]
        one = {pattern: (names[index],) for pattern, names in self.sources.items()}
        return self._convert(model, lambda name: read(self.headers[name]), one)[self.first][0]

    @property
    def first_source(self) -> str:
        """The first checkpoint tensor; the only one where there is no conversion."""
        return self.names[0]

    def _convert(
        self, model: PreTrainedModel, read: Callable[[str], Tensor], sources: dict[str, tuple[str, ...]]
    ) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.first: read(self.first_source)}
        converter: Any = deepcopy(self.converter)  # it collects tensors, so each use needs its own
        for pattern, names in sources.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, lambda name=name: read(name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def read(stored: Stored, rows: tuple[int, int] | None = None) -> Tensor:
    """A stored tensor, or rows [first, last) of its leading axis, as the weight that it stands for."""
    return stored.read(rows) if isinstance(stored, ScaledWeight) else read_tensor(stored, rows)


def _meta(header: Stored) -> Tensor:
    return torch.empty(header.shape, dtype=header.dtype, device="meta")


def find_origins(model: PreTrainedModel, headers: dict[str, Stored]) -> dict[str, Origin]:
    """Matches a checkpoint's tensors to a model's parameters and persistent buffers: name -> its origin.

    `model` may be on the meta device; it must have its modules as transformers makes them. Names without an origin
    are absent from the result. Raises ModelError when a conversion cannot be applied or gives another shape.
    """
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    chosen: dict[str, WeightConverter | None] = {}
    sources: dict[str, dict[str, list[str]]] = {}
    for name in sorted(headers, key=dot_natural_key):  # in order, so that expert 10 follows expert 9
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # right as it is, and a rule meant for other checkpoints spoilt it
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            chosen.setdefault(target, by_pattern[pattern] if pattern is not None else None)
            sources.setdefault(target, {}).setdefault(pattern or name, []).append(name)
    origins: dict[str, Origin] = {}
    for target, converter in chosen.items():
        groups = {pattern: tuple(names) for pattern, names in sources[target].items()}
        origin = Origin(target, converter, groups, headers)
        for made, tensor in _checked_meta(origin, model).items():
            if made in state and tensor.shape != state[made].shape:
                raise ModelError(_shape_message(model, made, origin, tensor, state[made]))
            origins[made] = origin
    return origins


def _checked_meta(origin: Origin, model: PreTrainedModel) -> dict[str, Tensor]:
    try:
        return origin.meta(model)
    except Exception as error:  # whatever a conversion raises on shapes or counts it did not expect
        raise ModelError(
            f"{origin.first}: its checkpoint tensors ({len(origin.names)}, from {origin.first_source}) cannot be "
            f"converted: {error}. The checkpoint does not fit config.json; check that both are of one model."
        ) from error


def _shape_message(model: PreTrainedModel, name: str, origin: Origin, tensor: Tensor, expected: Tensor) -> str:
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(head.weight) for head in heads if head is not None and hasattr(head, "weight")}
    where = f"{name} (stored as {origin.first_source})"
    if id(model.get_parameter_or_buffer(name)) in tables and tensor.shape[1:] == expected.shape[1:]:
        return (
            f"{where} has {tensor.shape[0]} rows and config.json says vocab_size = {expected.shape[0]}. The vocabulary "
            "was resized without saving one of the two: correct vocab_size in config.json, or save the model again "
            "after resize_token_embeddings."
        )
    return (
        f"{where} has shape {list(tensor.shape)}; config.json asks for {list(expected.shape)}. "
        "The checkpoint and config.json are not of one model."
    )


def expert_origin(
    model: PreTrainedModel, origins: dict[str, Origin], name: str
) -> tuple[str, int, Callable[[Tensor], Tensor]] | None:
    """Where one expert's own parameter, `<experts>.<i>.<projection>.<leaf>`, comes from in `model`, whose experts are fused.

    Returns:
        The fused parameter, the expert's row in it, and the function that takes the part out of that row; None when `name`
        is not of this form or has no such origin.
    """
    *path, index, projection, leaf = name.split(".") if name.count(".") >= 3 else [""] * 3
    experts, wanted = ".".join(path), f"{projection}.{leaf}"
    suffix = "_bias" if leaf == "bias" else ""
    candidates = [f"{experts}.{fused}{suffix}" for fused in (projection, "gate_up_proj")]
    found = [fused for fused in candidates if index.isdecimal() and fused in origins]
    layout = expert_layout(model, experts) if found else None
    if layout is None:
        return None
    parameter = found[0].rpartition(".")[2]
    return found[0], int(index), lambda row: layout.parts(parameter, row)[wanted]
