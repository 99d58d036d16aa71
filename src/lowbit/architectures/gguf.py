"""What llama.cpp calls a model type, the numbers that it wants of its config, and how its tensors differ from transformers'.

A model type without an entry has no GGUF file from here. An entry refuses configs that llama.cpp would compute otherwise, so
that a file either is the model or is not written. Tensor names come from the package gguf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Metadata = dict[str, int | float | bool | str | list[int] | list[bool]]
"""Keys of a GGUF file below the name of the architecture."""


@dataclass(frozen=True)
class GgufArchitecture:
    """A model type in GGUF.

    Args:
        name: ``general.architecture``.
        activations: the functions of its gate that llama.cpp computes with.
        numbers: of a config, beside those that all have. It raises ValueError for what llama.cpp computes otherwise.
        paired: names of linears whose rows belong to heads with rotary embedding; llama.cpp has both halves of a head
            interleaved.
        gain_offset: what is added to the gains of norms.
        biases: whether linears may have biases.
        windows: whether attention in windows is known; otherwise the context ends with the window.
    """

    name: str
    activations: tuple[str, ...]
    numbers: Callable[[Any], Metadata] = lambda config: {}
    paired: tuple[str, ...] = ()
    gain_offset: float = 0.0
    biases: bool = False
    windows: bool = False

    def metadata(self, config: Any) -> Metadata:
        """The keys for ``config`` without their prefix.

        Raises:
            ValueError: a config that llama.cpp would compute otherwise.
        """
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        act = getattr(config, "hidden_activation", None) or config.hidden_act
        if act not in self.activations:
            raise ValueError(f"its {self.name} computes {self.activations[0]}, this model {act}")
        if getattr(config, "attention_bias", False) and not self.biases:
            raise ValueError(f"its {self.name} has no biases in attention, this model has")
        window = _window(config)
        context = config.max_position_embeddings
        common: Metadata = {
            "vocab_size": config.vocab_size,
            "context_length": context if self.windows or window is None else min(context, window),
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": heads,
            "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
            "attention.key_length": head,
            "attention.value_length": head,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        }
        return common | self.numbers(config)

    def frequencies(self, config: Any) -> Tensor | None:
        """Divisors of the rotary frequencies, float32 ``[head / 2]``, which GGUF has as a tensor; None without any."""
        rope = _rope(config)
        return _llama3_divisors(config, rope) if rope.get("rope_type") == "llama3" else None

    def rows(self, name: str, config: Any, shape: tuple[int, ...]) -> Tensor | None:
        """The order in which GGUF has the rows of a tensor, as indices; None: their own.

        Args:
            name: in transformers.
            shape: of the tensor.
        """
        path = name.rpartition(".")[0]
        leaf = path.rpartition(".")[2]
        if leaf not in self.paired:
            return None
        heads = config.num_attention_heads
        if leaf != self.paired[0]:
            heads = getattr(config, "num_key_value_heads", None) or heads
        return torch.arange(shape[0]).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def adds(self, name: str) -> float:
        """What GGUF adds to the values of a tensor."""
        return self.gain_offset if re.search(r"norm\.weight$", name) else 0.0


def gguf_architecture(config: Any) -> GgufArchitecture:
    """The entry of a transformers config.

    Raises:
        ValueError: there is none.
    """
    entry = _ENTRIES.get(config.model_type)
    if entry is None:
        raise ValueError(f"models of type {config.model_type!r} are not written; {', '.join(_ENTRIES)} are")
    return entry


def _window(config: Any) -> int | None:
    """Tokens that the layers with the shortest attention see; None: all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return window if kinds is not None or getattr(config, "use_sliding_window", True) else None


def _rope(config: Any, kind: str | None = None) -> dict[str, Any]:
    rope = config.rope_parameters
    return rope[kind] if kind is not None else rope


def _scaled(rope: dict[str, Any]) -> Metadata:
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):  # the second is a tensor of divisors
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    raise ValueError(f"rotary embeddings of type {kind!r} are not written; default, linear and llama3 are")


def _plain_rope(config: Any) -> Metadata:
    rope = _rope(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    return {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * share),
        **_scaled(rope),
    }


def _llama3_divisors(config: Any, rope: dict[str, Any]) -> Tensor:
    """Long waves are divided by the factor, short ones are not, those between smoothly (Llama 3.1)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    wave = 2 * math.pi / frequency
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((context / wave - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _scores(config: Any) -> None:
    """Raises ValueError where scores are scaled otherwise than by the size of a head, or of a share of the stream in models
    of the largest size."""
    asked = config.query_pre_attn_scalar
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    share = config.hidden_size // config.num_attention_heads
    computed = share if config.num_hidden_layers == largest else config.head_dim
    if asked != computed:
        raise ValueError(
            f"attention scores are scaled by 1/sqrt({asked}), llama.cpp scales those of this size by 1/sqrt({computed})"
        )


def _alternates(config: Any, period: int) -> None:
    """Raises ValueError where layers of full attention are not every ``period``-th."""
    kinds = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        raise ValueError(f"llama.cpp has full attention in every {period}th layer, this model in others")


def _gemma2(config: Any) -> Metadata:
    _scores(config)
    _alternates(config, 2)
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise ValueError("llama.cpp caps the scores and logits of gemma2, this model does not")
    return {
        **_plain_rope(config),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3(config: Any) -> Metadata:
    _scores(config)
    _alternates(config, 6)
    if config.attn_logit_softcapping is not None:
        raise ValueError("attention scores of gemma3 are not capped in llama.cpp, those of this model are")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("attention in both directions is not written")
    full, local = _rope(config, "full_attention"), _rope(config, "sliding_attention")
    if local.get("rope_type", "default") != "default" or full.get("rope_type") == "llama3":
        raise ValueError("rotary embeddings of layers with a window are plain in llama.cpp, these are scaled")
    if local["rope_theta"] != 10000.0:
        raise ValueError(f"llama.cpp has a base of 10000 in layers with a window, this model {local['rope_theta']:g}")
    found: Metadata = {
        "rope.freq_base": float(full["rope_theta"]),
        "attention.sliding_window": config.sliding_window,
        **_scaled(full),
    }
    if config.final_logit_softcapping is not None:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


def _phi3(config: Any) -> Metadata:
    if _rope(config).get("rope_type", "default") != "default":
        raise ValueError(f"rotary embeddings of type {_rope(config)['rope_type']!r} are not written for phi3")
    return {
        **_plain_rope(config),
        "rope.scaling.original_context_length": config.original_max_position_embeddings
        or config.max_position_embeddings,
    }


_LLAMA = GgufArchitecture("llama", ("silu",), _plain_rope, ("q_proj", "k_proj"), biases=True)
_GELU = ("gelu_pytorch_tanh",)
_ENTRIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufArchitecture("qwen2", ("silu",), _plain_rope, biases=True),
    "qwen3": GgufArchitecture("qwen3", ("silu",), _plain_rope),
    "gemma": GgufArchitecture("gemma", _GELU, _plain_rope, gain_offset=1.0),
    "gemma2": GgufArchitecture("gemma2", _GELU, _gemma2, gain_offset=1.0, windows=True),
    "gemma3_text": GgufArchitecture("gemma3", _GELU, _gemma3, gain_offset=1.0, windows=True),
    "phi3": GgufArchitecture("phi3", ("silu",), _phi3),
}
"""By transformers' model type."""


def gguf_names() -> frozenset[str]:
    """The architectures of GGUF that have an entry."""
    return frozenset(entry.name for entry in _ENTRIES.values())


def same_in_gguf(one: str | None, other: str | None) -> bool:
    """Whether GGUF has one name for two of transformers' model types: a file then says either, whichever the model was."""
    first, second = (_ENTRIES.get(each or "") for each in (one, other))
    return first is not None and second is not None and first.name == second.name
