"""How every measurement calls a model: batch 1, in evaluation mode, without gradients; modes are restored afterwards.

It uses `torch.no_grad`, not `torch.inference_mode`: a module that keeps a tensor from its forward pass (an unpacked
weight, a rotary table) would keep an inference tensor, which autograd refuses to train through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.decoding import cache_argument
from lowbit.decoding.packed_cache import packed_cache, simulated_cache
from lowbit.modules import KVFormats, KVSpec, OperandRanges, QuantLinear, kv_formats
from lowbit.numerics import PerGroup, PerToken


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """A context with evaluation mode (no dropout) and without gradients. Each module's own mode returns afterwards."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


MOST = 32
"""Tokens that a model with a quantized cache reads at a time, at most."""
AT_ONCE = 2**30
"""Bytes that the scores of a window may take, in each layer, where token by token is computed for all tokens at once."""


def chunk_of(formats: KVFormats) -> int:
    """Tokens that a model with a quantized cache reads at a time.

    Within a call a model sees its own tokens as they are, as if so many more recent tokens were kept. That is harmless beside a
    window of recent tokens that is twice as long, and misleading without one: SmolLM2 with 4 bits per token and no window loses
    0.38 nats token by token, and 0.09 in chunks of 32. So formats without a window are read token by token.
    """
    recent = [spec.recent for spec in _packing(formats)]
    return MOST if not recent else min(MOST, max(1, min(recent) // 2))


def _packing(formats: KVFormats) -> list[KVSpec]:
    """The formats that pack keys or values."""
    specs = (formats.kv, *(rule.kv for rule in formats.overrides))
    return [spec for spec in specs if spec is not None and (spec.key is not None or spec.value is not None)]


NOTHING_PACKED = "of which nothing was read packed"
"""In the name of a measurement through a quantized cache that tells nothing of it."""


def through(formats: KVFormats, chunk: int | None = None, longest: int | None = None) -> str:
    """How a measurement says that it read through a cache, and that nothing was read packed where its windows of at most
    ``longest`` tokens are too short for that: such figures are those of the plain cache."""
    size = chunk or chunk_of(formats)
    said = "through the cache, " + ("token by token" if size == 1 else f"chunks of {size}")
    floating = max(size, min((spec.sink + spec.recent for spec in _packing(formats)), default=0))
    if longest is None or not _packing(formats) or longest > floating:
        return said
    return f"{said}, {NOTHING_PACKED}: the first {floating} tokens are read as they are"


def logits_of(
    model: PreTrainedModel, ids_T: Tensor, *, cached: bool = True, last: int | None = None, chunk: int | None = None
) -> Tensor:
    """Logits [T, vocabulary] of one sequence `ids_T` (int64), or of its `last` tokens, in the model's own dtype and on its own
    device.

    Where the model's formats quantize its cache, and `cached`, it reads the sequence in chunks of `chunk` tokens (None:
    `chunk_of`) through that cache; otherwise at once and without a cache. What token by token gives is computed for all tokens
    at once where that is known to be the same (:func:`~lowbit.decoding.packed_cache.simulated_cache`): a thousand calls are one.
    """
    ids_1T, formats = ids_T[None].to(model.device), kv_formats(model)
    keep = {} if last is None else {"logits_to_keep": last}
    if not cached or not formats:
        return model(input_ids=ids_1T, use_cache=False, **keep).logits[0]
    size = chunk or chunk_of(formats)
    if size == 1 and _fits_at_once(model, len(ids_T)) and _tokens_are_alone(model):
        with suppress(ValueError), simulated_cache(model, formats):  # of attention that cannot be simulated
            return model(input_ids=ids_1T, use_cache=False, **keep).logits[0]
    past = {cache_argument(model): packed_cache(model, formats.kv, formats.overrides)}
    skipped, logits = 0 if last is None else len(ids_T) - last, []
    for piece in ids_1T.split(size, 1):
        found = model(input_ids=piece, use_cache=True, **past).logits[0]
        logits.append(found[skipped:].clone() if skipped else found)
        skipped = max(0, skipped - piece.shape[1])
    return torch.cat(logits)


def _fits_at_once(model: PreTrainedModel, length: int) -> bool:
    """Whether every layer can hold the scores of ``length`` tokens as they are and as packed, and their probabilities."""
    heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None)
    return isinstance(heads, int) and 5 * 4 * heads * length**2 <= AT_ONCE


def rows_are_alone(model: nn.Module) -> bool:
    """Whether the logits of a sequence do not depend on what else is in its batch, padding included.

    They do where a dynamic range or the choice of outlier channels belongs to a whole call, and a quantized cache reads one
    sequence at a time.
    """
    return not kv_formats(model) and _tokens_are_alone(model)


def _tokens_are_alone(model: nn.Module) -> bool:
    """Whether linears and operands of attention quantize each token by itself, whatever other tokens are in the call."""
    if any(isinstance(module, OperandRanges) for module in model.modules()):
        return False
    acts = (module.act for module in model.modules() if isinstance(module, QuantLinear))
    return all(
        act is None or act.static or (not act.threshold and isinstance(act.spec.granularity, PerToken | PerGroup))
        for act in acts
    )


def protocol_name(model: PreTrainedModel, protocol: str, chunk: int | None = None, longest: int | None = None) -> str:
    """The name of a protocol, and how the model reads where that is not at once; arguments as of :func:`through`."""
    formats = kv_formats(model)
    return f"{protocol}, {through(formats, chunk, longest)}" if formats else protocol


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of rows of the input embedding. Ids below it are legal."""
    return model.config.get_text_config().vocab_size
