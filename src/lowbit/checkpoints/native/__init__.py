"""lowbit's own checkpoints: safetensors shards, their index, and config.json, which is written last.

A directory without config.json does not load, here or in transformers, so nothing half-written is taken for a model.
Tensors carry the names that they have in the running model; tensors of packed layers are laid out as
:mod:`lowbit.layouts.canonical` says. What is quantized is said in config.json (:mod:`lowbit.checkpoints.description`).
No pickle is read or written.
"""

from lowbit.checkpoints.native.file_format import Native, save
from lowbit.checkpoints.native.loading import bits_per_weight, load
from lowbit.checkpoints.native.reading import (
    Checkpoint,
    bits_report,
    is_native,
    model_bits_per_weight,
    read_checkpoint,
)
from lowbit.checkpoints.native.writing import ShardWriter, plain_config, write_checkpoint, write_checkpoint_index

__all__ = [
    "Checkpoint",
    "Native",
    "ShardWriter",
    "bits_per_weight",
    "bits_report",
    "is_native",
    "load",
    "model_bits_per_weight",
    "plain_config",
    "read_checkpoint",
    "save",
    "write_checkpoint",
    "write_checkpoint_index",
]
