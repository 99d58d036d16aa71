"""Memory for time: blocks that run again in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, each block keeps only its inputs, and runs again in the backward pass.

    It wraps the blocks themselves and not, as transformers' ``gradient_checkpointing_enable``, only models that support it and
    are in training mode, which switches dropout on.
    """
    wrapped = list(blocks)
    for block in wrapped:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in wrapped:
            del block.__dict__["forward"]


@contextmanager
def replaced(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """While open, ``model`` computes with ``values`` in place of its parameters of these names.

    For the forward and the backward pass: a block that runs again must find the same values.
    """
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    own = [module._parameters[leaf] for module, leaf in places]
    try:
        for (module, leaf), value in zip(places, values.values(), strict=True):
            module._parameters[leaf] = value  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for (module, leaf), parameter in zip(places, own, strict=True):
            module._parameters[leaf] = parameter
