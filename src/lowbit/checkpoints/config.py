"""What a model's config.json says, as transformers reads it and as this project uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowbit.architectures import is_language_model
from lowbit.checkpoints.scaled import READABLE
from lowbit.checkpoints.shards import ModelError


def quantization_of(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What a config says of its quantized weights; None: they are not quantized."""
    text_config = raw.get("text_config")
    for part in (raw, text_config if isinstance(text_config, dict) else {}):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            return quantization if isinstance(quantization, dict) else {}
    return None


def load_config(name: str, path: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in raw):
        remedy = (
            "It brings code of its own (auto_map); if you trust that code, pass trust_remote_code=True."
            if "auto_map" in raw
            else "A newer transformers may know it."
        )
        raise ModelError(f"{name}: config.json has model_type {model_type!r}, unknown to transformers here. {remedy}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation in config classes raises errors of many types
        raise ModelError(f"{path / 'config.json'}: cannot be used ({type(error).__name__}: {error}).") from error
    if model_type in CONFIG_MAPPING and not is_language_model(config):
        raise ModelError(f"{name}: a {model_type!r} model; expected a causal language model.")
    for part in (config, config.get_text_config()):
        if (getattr(part, "quantization_config", None) or {}).get("quant_method") in READABLE:
            del part.quantization_config  # pyright: ignore[reportAttributeAccessIssue]  # its weights are read as what they stand for
    if getattr(config, "rescale_every", 0):
        # The model divides weights of its blocks when it first runs, and hidden states in turn. This only keeps float16 in
        # range; without it the function is the same, and packed weights cannot be divided.
        config.rescale_every = 0
    plain_outputs(config)
    return config


def plain_outputs(config: Any) -> None:
    """Resets what a config says of the outputs of calls, which is the caller's choice: an object with logits, nothing else."""
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False


def check_positions(model: Any, positions: int, what: str) -> None:
    """Refuses more positions than a model, or what has its config, was configured for.

    A learned position table would fail with an index error deep inside; rotary models would run and give meaningless
    figures.

    Raises:
        ValueError: `positions` exceeds the config's `max_position_embeddings`. Without such a limit nothing is checked.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and positions > limit:
        raise ValueError(f"{what} needs {positions} positions and the model has {limit}: ask for at most {limit}")
