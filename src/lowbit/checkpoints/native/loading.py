"""Native checkpoints as running models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lowbit.architectures import auto_class
from lowbit.checkpoints import transformers_plugin as _transformers_plugin  # noqa: F401  (teaches transformers to read these)
from lowbit.checkpoints.config import plain_outputs
from lowbit.checkpoints.native.reading import read_checkpoint
from lowbit.checkpoints.scaled import holds_scaled
from lowbit.checkpoints.shards import ModelError, refuse_adapter
from lowbit.checkpoints.source import open_model
from lowbit.modules import QuantLinear


def load(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    unfinished: bool = False,
) -> Any:
    """A running transformers model, in evaluation mode, from a native checkpoint or from an ordinary model directory.

    Args:
        directory: a local directory.
        dtype: of everything that is not packed, and so of the computation; None: the one in config.json. Packed tensors
            are the same bits whatever it is.
        device: where to put the model.
        trust_remote_code: lets the model's own Python code run.
        unfinished: loads a directory that its run has not declared finished; for the run's own last check.

    Raises:
        ModelError: a ValueError that says what is wrong: an unfinished directory, a missing or truncated shard, a layer
            that lacks a tensor, an unknown version. Pickled weights are never read.
    """
    directory = Path(directory)
    checkpoint = read_checkpoint(directory, unfinished=unfinished)
    refuse_adapter(directory)
    if checkpoint.description is None and holds_scaled(checkpoint.headers):
        source = open_model(directory, trust_remote_code=trust_remote_code)
        asked = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        whole: Any = source.load_full(asked if isinstance(asked, torch.dtype) else source.dtype)
        return whole.to(device)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        loaded: Any = auto_class(config).from_pretrained(
            directory,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except (ModelError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a model's class says to a config that it cannot be built from
        said = " ".join(str(error).split())
        raise ModelError(
            f"{directory}: transformers cannot load the model that config.json describes: {type(error).__name__}: {said:.300}"
        ) from error
    model, info = loaded
    lost = sorted(info["missing_keys"])
    if checkpoint.description is not None:
        lost += sorted(info["unexpected_keys"])
    if lost:
        raise ModelError(
            f"{directory}: the checkpoint and the model that config.json describes differ in {len(lost)} tensors: "
            f"{', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}. "
            "It is incomplete or config.json is of another model"
        )
    plain_outputs(model.config)
    return model.to(device).eval()


def bits_per_weight(model: nn.Module) -> float | None:
    """Stored bits over replaced weights of the packed linears of a model's blocks, biases left out; None where nothing is packed.

    A packed output head is not among them, nor is it in the figure of :class:`lowbit.QuantizeReport`: both are of what the recipe's
    scheme is for. Those of the whole model count it.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = [module for module in model.modules() if isinstance(module, QuantLinear) and module is not head]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(layer.stored_bits for layer in layers) / weights if layers else None
