"""The native checkpoint: load it, checked. Importing this module also teaches transformers to read it.

Writing is :mod:`lowbit.formats.checkpoint`; what the config says, :mod:`lowbit.formats.description`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowbit.calibrate.shards import ModelError
from lowbit.calibrate.source import load_tokenizer
from lowbit.formats.checkpoint import (
    bits_per_weight,
    bits_report,
    is_native,
    read_checkpoint,
    save,
    write_checkpoint,
    write_checkpoint_index,
)
from lowbit.formats.description import layer_configs, quantization_config, swap
from lowbit.formats.hf import LowbitConfig, LowbitQuantizer


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
    config, _ = read_checkpoint(directory, unfinished=unfinished)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    model, info = loaded
    lost = sorted(info["missing_keys"]) + (sorted(info["unexpected_keys"]) if is_native(config) else [])
    if lost:
        raise ModelError(
            f"{directory}: the checkpoint and the model that config.json describes differ in {len(lost)} tensors: "
            f"{', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}. "
            "It is incomplete or config.json is of another model"
        )
    return model.to(device).eval()


__all__ = [
    "LowbitConfig",
    "LowbitQuantizer",
    "ModelError",
    "bits_per_weight",
    "bits_report",
    "layer_configs",
    "load",
    "load_tokenizer",
    "quantization_config",
    "read_checkpoint",
    "save",
    "swap",
    "write_checkpoint",
    "write_checkpoint_index",
]
