"""Memory for time: blocks that run again in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, each block keeps only its inputs, and runs again in the backward pass.

    It wraps the blocks themselves and not, as transformers' ``gradient_checkpointing_enable``, only models that support it and
    are in training mode, which switches dropout on.
    """
    wrapped = [(block, block.__dict__.get("forward")) for block in blocks]
    for block, _ in wrapped:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, before in wrapped:
            del block.__dict__["forward"]
            if before is not None:
                block.forward = before


@contextmanager
def replaced(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """While open, ``model`` computes with ``values`` in place of its parameters and buffers of these names.

    For the forward and the backward pass: a block that runs again must find the same values.
    """
    named = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    places: list[tuple[dict[str, Any], str]] = [
        (module._parameters if leaf in module._parameters else module._buffers, leaf) for module, leaf in named
    ]
    own = [held[leaf] for held, leaf in places]
    try:
        for (held, leaf), value in zip(places, values.values(), strict=True):
            held[leaf] = value
        yield
    finally:
        for (held, leaf), tensor in zip(places, own, strict=True):
            held[leaf] = tensor
