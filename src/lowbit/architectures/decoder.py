"""Where the text of a model is: the class that transformers loads it with, its decoder, and the decoder's list of blocks."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from lowbit.modules import DraftLinear

LINEAR_TYPES = (nn.Linear, Conv1D, DraftLinear)


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that makes the whole model of ``config``.

    Some configurations have two classes: the model with its images, and the text alone. ``config.architectures`` says which
    one the checkpoint is of; where it says nothing, it is the whole model.
    """
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    names = getattr(config, "architectures", None) or ()
    text: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind] if kind in MODEL_FOR_CAUSAL_LM_MAPPING else None
    text_only = text is not None and text.__name__ in names
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def is_language_model(config: Any) -> bool:
    """Whether transformers makes a model with a language head of ``config``."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def decoder_of(model: Any) -> nn.Module:
    """The module that holds the blocks of the text: the innermost that ``get_decoder`` leads to.

    Raises:
        ValueError: ``model`` has an encoder too.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; expected a decoder alone")
    inner: Any = model
    while True:
        following: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
        following = inner.base_model if following is inner and hasattr(inner, "base_model") else following
        if following is inner or not isinstance(following, nn.Module):
            return inner
        inner = following


def blocks_path(model: Any) -> str:
    """The path of the decoder's list of blocks: the one list at its top with as many members as the config has layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    if getattr(model, "config", None) is None:
        raise ValueError(f"the blocks of {type(model).__name__} are not known: expected a model of transformers")
    decoder, layers = decoder_of(model), getattr(model.config.get_text_config(), "num_hidden_layers", None)
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    lists = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    fitting = [path for path, module in outermost.items() if len(module) == layers and _are_blocks(module)]
    top = min((path.count(".") for path in fitting), default=0)
    found = [path for path in fitting if path.count(".") == top]
    if len(found) != 1:
        sizes = ", ".join(f"{path} ({len(module)})" for path, module in list(outermost.items())[:5]) or "none"
        raise ValueError(
            f"the blocks of {type(model).__name__} are not known: expected one list of {layers} modules with linears in "
            f"{type(decoder).__name__}, found {'several' if found else 'none'} (its lists: {sizes}); add an architecture "
            "table for it"
        )
    return f"{prefix}.{found[0]}" if prefix else found[0]


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Whether these are modules with linears inside, not linears themselves."""
    holding = (any(isinstance(inner, LINEAR_TYPES) for inner in module.modules()) for module in modules)
    return any(holding) and not any(isinstance(module, LINEAR_TYPES) for module in modules)
