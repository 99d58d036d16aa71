"""The original's logits without the original: hidden states that one pass kept, and the modules outside the blocks.

Running the original with each of many quantized models costs a second forward pass and a second model in memory every
time, for the same logits. Kept logits would take the vocabulary's size times the tokens. Hidden states after the last
block are a hundred times smaller, and the model's own code makes the logits from them (norm, head, and any later
scaling).

Law: ``KeptOriginal(...).logits(ids)`` equals the original's logits for ``ids`` bit for bit.
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
    """While open, every forward pass of one sequence writes the hidden states after the last block to ``directory``.

    Each sequence has one file, named by a hash of its ids.
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
    """An original model with only the modules outside its blocks in memory, and hidden states on disk.

    Args:
        source: the original's checkpoint.
        directory: filled by :func:`keep_states` from a model in float32.
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
