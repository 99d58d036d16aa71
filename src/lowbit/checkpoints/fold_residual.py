"""The rotation of a residual stream in embeddings and head, for formats whose readers run plain models.

Here the stream is turned where it enters the first block and where it leaves the last (:mod:`lowbit.modules.residual`). The same
function without those turns: rows of the embedding are turned, E R; the gain g of the last norm moves into the head, which reads the
turned stream, W diag(g) R, because a norm without a gain does not see a rotation. A head that shares the embedding's matrix gets one of
its own. Both are rounded to the dtype in which they were stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.architectures import for_config
from lowbit.architectures.table import Architecture
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.packed_model import PackedLayer, PackedModel, PlainTensor
from lowbit.modules import ResidualRotation, StoredRotation
from lowbit.transforms import Rotate, Seeded


def without_residual(description: ModelDescription, config: Any) -> ModelDescription:
    """What :func:`folded` makes of a description; the same where nothing is rotated, or where an end of the stream is packed or is
    more than an embedding, or a norm and a head.

    Args:
        description: of the model.
        config: its transformers config.
    """
    if description.residual is None:
        return description
    table = for_config(config)
    plain = len(table.embed) == 1 and table.head is not None and table.final_norm is not None and not table.after
    if not plain or table.embed[0] in description.embeddings or table.head in description.layers:
        return description
    return replace(description, residual=None)


def folded(model: PackedModel, config: Any) -> PackedModel:
    """``model`` with the rotation of its residual stream in its embedding and head; the same where :func:`without_residual` is."""
    description = without_residual(model.description, config)
    if description is model.description:
        return model
    table = for_config(config)
    untied = {**model.config, "tie_word_embeddings": False}
    return replace(model, description=description, config=untied, parts=lambda: _parts(model, table))


def _parts(model: PackedModel, table: Architecture) -> Iterator[PackedLayer | PlainTensor]:
    """The parts, the head last; its matrix is held until then."""
    residual = model.description.residual
    assert residual is not None
    embedding, head, norm = f"{table.embed[0]}.weight", f"{table.head}.weight", f"{table.final_norm}.weight"
    offset = table.norms[0].gain_offset
    held: dict[str, Tensor] = {}
    rotation = _rotation(model, residual)
    for part in model.parts():
        if part.name == residual.tensor:
            continue
        if not isinstance(part, PlainTensor) or part.name not in (embedding, head, norm):
            yield part
            continue
        held[part.name] = part.tensor
        if part.name == embedding:
            yield PlainTensor(embedding, rotation.forward(part.tensor.double()).to(part.tensor.dtype))
        elif part.name == norm:
            yield PlainTensor(norm, torch.full_like(part.tensor, 1.0 - offset))
    matrix = held.get(head, held[embedding])  # one matrix where they are tied
    weight, _ = rotation.fold_in(matrix.double() * (held[norm].double() + offset), None)
    yield PlainTensor(head, weight.to(matrix.dtype))


def _rotation(model: PackedModel, residual: ResidualRotation) -> Seeded | Rotate:
    """The rotation itself: a stored one is looked for among the parts."""
    if not isinstance(residual.rotation, StoredRotation):
        return residual.rotation
    for part in model.parts():
        if part.name == residual.tensor:
            assert isinstance(part, PlainTensor)
            return Rotate(part.tensor)
    raise AssertionError(f"{residual.tensor} is described and not there")
