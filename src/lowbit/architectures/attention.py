"""Quantized attention in transformers' models, which look up their attention function in a registry.

An attribute of an attention module turns quantization on; all other modules attend as usual. One function thus serves a
model in which only some blocks are quantized so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.architectures.resolved import ResolvedBlock
from lowbit.caches import PackedStates, attend_packed
from lowbit.modules import AttentionSpec, OperandRanges, attend

IMPLEMENTATION = "lowbit"
SPEC = "lowbit_attention"
"""The attribute of an attention module that holds its formats."""
RANGES = "lowbit_operands"
"""The submodule of an attention module that holds its static ranges, once they are known."""
_OBSERVER = "lowbit_observer"


def attention_modules(resolved: ResolvedBlock) -> tuple[str, ...]:
    """Paths of the block's attention modules: those that hold an output projection."""
    return tuple(path.rpartition(".")[0] for path, role in resolved.linears.items() if role == "o")


def check_attention(model: PreTrainedModel, otherwise: str = "quantized; leave attention_bits out") -> None:
    """Checks that ``model`` attends through transformers' interface.

    Args:
        otherwise: what its operands cannot be if it does not, and what to do.

    Raises:
        ValueError: it has its own attention code, which cannot be replaced.
    """
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its queries, keys and values "
            f"cannot be {otherwise}"
        )


def quantize_attention(module: nn.Module, spec: AttentionSpec | None) -> None:
    """Makes an attention module quantize its operands to ``spec``, or stop doing so (None).

    Static ranges start as ones. If ``spec`` does not know the heads there are no ranges, and nothing is quantized yet.
    """
    setattr(module, SPEC, spec)
    if hasattr(module, RANGES):
        delattr(module, RANGES)
    if spec is not None and spec.heads is not None:
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
        module.add_module(RANGES, OperandRanges(spec, device))


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """The formats that :func:`quantize_attention` set last."""
    return getattr(module, SPEC, None)


def operand_ranges(module: nn.Module) -> OperandRanges | None:
    """The static ranges of an attention module; None if they are not known."""
    return getattr(module, RANGES, None)


@contextmanager
def observed(module: nn.Module, observer: Callable[[Tensor, Tensor, Tensor, float | None], None]) -> Iterator[None]:
    """While open, calls ``observer`` with the operands of every attention call of ``module``, as they are multiplied.

    Args:
        module: an attention module.
        observer: takes queries ``[B, H, T, D]``, keys ``[B, G, S, D]``, values ``[B, G, S, D]``, and the factor of scores
            (None: 1 / sqrt(D)).
    """
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
    if spec is None and isinstance(key, PackedStates) and isinstance(value, PackedStates) and _plain(query, kwargs):
        mixed = attend_packed(query, key.layer, attention_mask, scaling)
        key.layer.settle()
        return mixed, None
    if (observer := getattr(module, _OBSERVER, None)) is not None:
        observer(query, key, value, scaling)
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


def _plain(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether an attention call asks for nothing but a softmax over the keys that its mask shows."""
    asked = ("softcap", "s_aux", "position_bias", "dropout")
    causal = query.shape[2] == 1 or options.get("is_causal") is not False
    return causal and not any(options.get(name) is not None and options.get(name) != 0 for name in asked)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
