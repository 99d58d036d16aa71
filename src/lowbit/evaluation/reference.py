"""The original's logits without the original: hidden states that one pass kept, and the part behind the blocks.

Comparing many quantized models with one original by running it beside each of them costs a second forward pass and a
second model in memory every time, for logits that are always the same. Kept logits would be the vocabulary's size times
the tokens; the hidden states behind the last block are a hundred times smaller, and the model's own code makes the
logits of them again (norm, head, and whatever a model does to them afterwards).

Law: ``KeptOriginal(...).logits(ids)`` is bit for bit what the original gave for ``ids``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.architectures import block_modules, for_config
from lowbit.checkpoints.source import ModelSource
from lowbit.stages.stream import Stream, outside


@contextmanager
def keep_states(model: PreTrainedModel, directory: Path) -> Iterator[None]:
    """While open, every forward pass of one sequence leaves the hidden states behind the last block in ``directory``.

    A file a sequence, named by its ids, so that they are found again whatever the order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    running: list[Path] = []

    def begin(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        running[:] = [_file(directory, kwargs["input_ids"][0])]

    def keep(_: Any, args: Any, output: Any) -> None:
        as_tuple = isinstance(output, tuple)
        hidden_1Td = output[0] if as_tuple else output
        save_file({"hidden": hidden_1Td.cpu().contiguous()}, running[0], {"as_tuple": str(as_tuple)})

    last = block_modules(model, for_config(model.config))[-1]
    hooks = (model.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class KeptOriginal:
    """An original model of which only what lies outside its blocks is in memory, and hidden states are on disk.

    Args:
        source: the original's checkpoint.
        directory: what :func:`keep_states` filled, from a model in float32.
    """

    def __init__(self, source: ModelSource, directory: Path):
        self.model, self.directory = source.skeleton(), directory
        architecture = for_config(source.config)
        source.load(self.model, outside(self.model, architecture))
        self.stream = Stream(self.model, architecture)

    def logits(self, ids_T: Tensor) -> Tensor:
        """The original's logits ``[T, vocabulary]`` of one sequence.

        Raises:
            ValueError: no states of this sequence were kept.
        """
        file = _file(self.directory, ids_T)
        if not file.exists():
            raise ValueError(
                f"{self.directory} keeps no hidden states of this window: run the original on the same text first"
            )
        with safe_open(file, "pt") as kept:
            hidden_1Td, self.stream.as_tuple = kept.get_tensor("hidden"), kept.metadata()["as_tuple"] == "True"
        return self.stream.logits(ids_T[None], hidden_1Td)


def _file(directory: Path, ids_T: Tensor) -> Path:
    ids = ids_T.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return directory / f"{hashlib.sha256(ids).hexdigest()}.safetensors"
