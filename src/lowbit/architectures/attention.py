"""Quantized attention in transformers' models, which ask a registry for the function that attends.

A module whose operands are to be quantized says so by an attribute; all others attend as they always do. So one function
serves a model in which some blocks are quantized already and others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.architectures.resolved import ResolvedBlock
from lowbit.modules import AttentionSpec, OperandRanges, attend

IMPLEMENTATION = "lowbit"
SPEC = "lowbit_attention"
"""The attribute of a module that attends in which its formats are."""
RANGES = "lowbit_operands"
"""The submodule of a module that attends in which its static ranges are, once they are known."""
_OBSERVER = "lowbit_observer"


def attention_modules(resolved: ResolvedBlock) -> tuple[str, ...]:
    """Paths of the block's modules that attend: those that hold an output projection."""
    return tuple(path.rpartition(".")[0] for path, role in resolved.linears.items() if role == "o")


def check_attention(model: PreTrainedModel) -> None:
    """Raises ValueError where ``model`` attends by code of its own, which nothing can take the place of."""
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its queries, keys and values "
            "cannot be quantized; leave attention_bits out"
        )


def quantize_attention(module: nn.Module, spec: AttentionSpec | None) -> None:
    """From now on ``module``, which attends, quantizes its operands as ``spec`` says; None: no longer.

    Static ranges begin as ones, and only where ``spec`` knows the heads; where it does not, nothing is quantized yet.
    """
    setattr(module, SPEC, spec)
    if hasattr(module, RANGES):
        delattr(module, RANGES)
    if spec is not None and spec.heads is not None:
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
        module.add_module(RANGES, OperandRanges(spec, device))


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """What :func:`quantize_attention` said last."""
    return getattr(module, SPEC, None)


def operand_ranges(module: nn.Module) -> OperandRanges | None:
    """The static ranges of a module that attends, where they are known."""
    return getattr(module, RANGES, None)


@contextmanager
def observed(module: nn.Module, observer: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, ``observer`` is given the queries, keys and values of every call in which ``module`` attends: ``[B, H, T, D]``,
    ``[B, G, S, D]`` and ``[B, G, S, D]``, as they are multiplied."""
    setattr(module, _OBSERVER, observer)
    try:
        yield
    finally:
        delattr(module, _OBSERVER)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    spec = attention_spec(module)
    if (observer := getattr(module, _OBSERVER, None)) is not None:
        observer(query, key, value)
    if spec is None and kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"attention sinks and position biases ({type(module).__name__}) cannot be quantized")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    softcap = kwargs.get("softcap")
    mixed = attend(
        query,
        key,
        value,
        spec,
        ranges=operand_ranges(module),
        mask=attention_mask,
        causal=causal,
        scaling=scaling,
        softcap=softcap,
    )
    return mixed, None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
