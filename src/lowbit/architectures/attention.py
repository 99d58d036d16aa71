"""Quantized attention in transformers' models, which ask a registry for the function that attends.

A module whose operands are to be quantized says so by an attribute; all others attend as they always do. So one function
serves a model in which some blocks are quantized already and others are not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.architectures.resolved import ResolvedBlock
from lowbit.modules import AttentionSpec, attend

IMPLEMENTATION = "lowbit"
SPEC = "lowbit_attention"
"""The attribute of a module that attends in which its formats are."""


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
    """From now on ``module``, which attends, quantizes its operands as ``spec`` says; None: no longer."""
    setattr(module, SPEC, spec)


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """What :func:`quantize_attention` said last."""
    return getattr(module, SPEC, None)


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
    if spec is None and kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"attention sinks and position biases ({type(module).__name__}) cannot be quantized")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    softcap = kwargs.get("softcap")
    mixed = attend(query, key, value, spec, mask=attention_mask, causal=causal, scaling=scaling, softcap=softcap)
    return mixed, None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
