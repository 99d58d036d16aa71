"""Quantized attention in transformers' models, which look up their attention function in a registry.

An attribute of an attention module turns quantization on; all other modules attend as usual. One function thus serves a
model in which only some blocks are quantized so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbit.architectures.resolved import ResolvedBlock
from lowbit.caches import CacheGradients, PackedLayer, PackedStates, attend_packed, attend_simulated
from lowbit.modules import AttentionSpec, OperandRanges, attend

IMPLEMENTATION = "lowbit"
SPEC = "lowbit_attention"
"""The attribute of an attention module that holds its formats."""
RANGES = "lowbit_operands"
"""The submodule of an attention module that holds its static ranges, once they are known."""
_OBSERVER = "lowbit_observer"
_SIMULATED = "lowbit_simulated_cache"


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
        with _attending(module):
            yield
    finally:
        delattr(module, _OBSERVER)


@contextmanager
def _attending(module: Any) -> Iterator[None]:
    """While open, ``module`` attends by the function of this file, if it does so through transformers' interface."""
    before, module.config._attn_implementation = module.config._attn_implementation, IMPLEMENTATION
    try:
        yield
    finally:
        module.config._attn_implementation = before


@contextmanager
def simulated_layers(
    module: nn.Module, layers: Mapping[int, PackedLayer], gradients: CacheGradients = CacheGradients()
) -> Iterator[None]:
    """While open, attention computes for a whole window, with gradients, what token-by-token decoding through a packed cache
    gives; see :mod:`lowbit.caches.simulated`.

    Backward passes that run parts of ``module`` again (gradient checkpointing) must run while this is open.

    Args:
        module: a model, or some blocks of one.
        layers: formats and coordinates of the cache's layers, by number. Attention modules with another number, such as those of
            sliding windows, attend as they do.
        gradients: those of keys and values.

    Raises:
        ValueError: a layer that no attention module of a model has; a block without attention modules; attention that does not
            go through transformers' interface (when it runs); quantized operands of attention.
    """
    numbered = ((getattr(each, "layer_idx", None), each) for each in module.modules() if _attends(each))
    attending = {number: each for number, each in numbered if isinstance(number, int)}
    missing = sorted(set(layers) - set(attending)) if isinstance(module, PreTrainedModel) else []
    if missing or not attending:
        raise ValueError(
            f"{type(module).__name__} has no attention modules that are known to be those of its cache's layers "
            f"{missing or sorted(layers)}, so a quantized cache cannot be simulated; leave it out"
        )
    with ExitStack() as stack:
        for number, attention in attending.items():
            if number in layers and layers[number].packs:
                stack.enter_context(_simulating(attention, layers[number], gradients))
        yield


def _attends(module: Any) -> bool:
    """Whether it is an attention module of transformers."""
    return hasattr(module, "is_causal") and hasattr(getattr(module, "config", None), "_attn_implementation")


@contextmanager
def _simulating(module: Any, layer: PackedLayer, gradients: CacheGradients) -> Iterator[None]:
    if attention_spec(module) is not None:
        raise ValueError(
            "a quantized cache and quantized operands of attention cannot be simulated together; leave one out"
        )
    entry = _Simulated(layer, gradients)
    setattr(module, _SIMULATED, entry)
    hook = module.register_forward_hook(entry.check)
    try:
        with _attending(module):
            yield
    finally:
        hook.remove()
        delattr(module, _SIMULATED)


class _Simulated:
    """A simulated layer, and whether attention has come to it."""

    def __init__(self, layer: PackedLayer, gradients: CacheGradients):
        self.layer, self.gradients, self.attended = layer, gradients, False

    def check(self, module: nn.Module, *_: Any) -> None:
        """After a forward pass of ``module``: attention of its own code would have read the cache as it is."""
        if not self.attended:
            raise ValueError(
                f"{type(module).__name__} does not attend through transformers' attention interface, so a quantized cache cannot "
                "be simulated; leave it out"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> Tensor:
        """Attention over the simulated layer."""
        self.attended = True
        unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
        if unknown or options["causal"] is False:
            raise ValueError(
                f"a quantized cache cannot be simulated with {', '.join(unknown) or 'attention in both directions'}"
            )
        return attend_simulated(
            query,
            key,
            value,
            self.layer,
            mask,
            options.get("scaling"),
            softcap=options.get("softcap"),
            dropout=options.get("dropout") or 0.0,
            gradients=self.gradients,
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    simulated: _Simulated | None = getattr(module, _SIMULATED, None)
    if simulated is not None:
        options = {**kwargs, "scaling": scaling, "causal": causal}
        return simulated.attend(query, key, value, attention_mask, options), None
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
