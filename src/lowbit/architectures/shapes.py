"""Sizes of well-known models, for models with random weights and for the shapes of their linears."""

from __future__ import annotations

from typing import Any

from lowbit.numerics.serialize import nearest

_LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
    "llama-13b": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
    "llama-3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "smollm2-135m": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}


def named_config(name: str) -> Any:
    """The transformers configuration with the sizes of the model ``name``.

    Raises:
        ValueError: a name that is not in :data:`SHAPES`.
    """
    from transformers import AutoConfig  # slow to import, and most uses of this package need none

    if name not in SHAPES:
        raise ValueError(f"no sizes are known for {name!r}{nearest(name, list(SHAPES))}")
    return AutoConfig.for_model(**SHAPES[name])
