"""The token embedding and the output head: which are packed, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.architectures import Architecture
from lowbit.modules import LinearDescription, scale_of
from lowbit.numerics import Spec
from lowbit.scheme import Scheme

LEAST_WEIGHTS = 2**20
"""Weights of embedding and head below which they are packed only if a recipe says so: there is little to gain."""


@dataclass(frozen=True)
class OutsidePlan:
    """What is packed outside of the blocks.

    Attributes:
        embeddings: the token embedding by module name, as a linear from channels to the vocabulary.
        layers: an output head with a weight of its own, by module name.
        tied_heads: an output head that is the embedding's table: module name -> name of the embedding.
        limit: nats a token that all of this may cost; beyond it nothing is packed. None: no limit.
    """

    embeddings: Mapping[str, LinearDescription] = field(default_factory=dict)
    layers: Mapping[str, LinearDescription] = field(default_factory=dict)
    tied_heads: Mapping[str, str] = field(default_factory=dict)
    limit: float | None = None

    def __bool__(self) -> bool:
        return bool(self.embeddings or self.layers)

    @property
    def stored(self) -> dict[str, LinearDescription]:
        """Every packed module that stores tensors, by name."""
        return {**self.embeddings, **self.layers}


def plan_outside(model: Any, architecture: Architecture, scheme: Scheme, bias_dtype: torch.dtype) -> OutsidePlan:
    """The plan for a skeleton.

    Raises:
        ValueError: a recipe that asks for what this model's embedding or head cannot have.
    """
    formats = scheme.chosen_outside
    if formats.embedding is None and formats.head is None:
        return OutsidePlan()
    table, head = _module(model, next(iter(architecture.embed), None)), _module(model, architecture.head)
    tied = _ties(model, table, head)
    embedding, head_format = formats.embedding, formats.head
    if tied:
        if embedding is not None and head_format is not None and embedding != head_format:
            raise ValueError(
                "the output head is the embedding's table, so both have one format; give embedding or head"
            )
        embedding, head_format = embedding or head_format, None
    problems = [
        _problem("embedding", embedding, table, scale_of(table[1]) is not None if table else False),
        _problem("head", head_format if not tied else embedding, head, bool(head) and type(head[1]) is nn.Linear),
    ]
    if any(problems):
        if scheme.outside is not None:
            raise ValueError(f"{' and '.join(filter(None, problems))}; leave its bits out")
        return OutsidePlan()
    embeddings, layers, heads = {}, {}, {}
    if table and embedding is not None:
        embeddings[table[0]] = LinearDescription(embedding, _shape(table[1]))
        heads = {head[0]: table[0]} if tied and head else {}
    if head and head_format is not None:
        biased = head[1]._parameters.get("bias") is not None
        layers[head[0]] = LinearDescription(head_format, _shape(head[1]), bias=bias_dtype if biased else None)
    plan = OutsidePlan(embeddings, layers, heads, formats.limit)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.stored.values())
    return OutsidePlan() if scheme.outside is None and weights < LEAST_WEIGHTS else plan


def _module(model: nn.Module, path: str | None) -> tuple[str, nn.Module] | None:
    return None if path is None else (path, model.get_submodule(path))


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return rows, columns


def _ties(model: Any, table: tuple[str, nn.Module] | None, head: tuple[str, nn.Module] | None) -> bool:
    """Whether the output head is the embedding's table."""
    if table is None or head is None:
        return False
    pairs = model.all_tied_weights_keys.items()
    return any({f"{head[0]}.weight", f"{table[0]}.weight"} == {*pair} for pair in pairs)


def _problem(what: str, spec: Spec | None, module: tuple[str, nn.Module] | None, right: bool) -> str | None:
    if spec is None or right:
        return None
    found = "there is none" if module is None else f"{module[0]} is a {type(module[1]).__name__}"
    return f"the {what} cannot be packed ({found})"
