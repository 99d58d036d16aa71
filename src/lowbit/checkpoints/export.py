"""export: a finished checkpoint, written again in a file format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowbit.architectures import auto_class
from lowbit.checkpoints.description import ModelDescription
from lowbit.checkpoints.fold_residual import folded
from lowbit.checkpoints.formats import find_format
from lowbit.checkpoints.model_card import rewrite_card
from lowbit.checkpoints.native import Native, is_native, plain_config, read_checkpoint
from lowbit.checkpoints.packed_model import PackedModel, PlainTensor
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.target import OutputError, check_target
from lowbit.checkpoints.to_run import open_packed


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        out: the directory.
        format: the name of the format.
        layers: how many packed layers it holds.
        bytes: of all its files.
        note: what whoever loads it should know; None: nothing.
    """

    out: Path
    format: str
    layers: int
    bytes: int
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self) | {"out": str(self.out)}


def export(
    checkpoint: str | os.PathLike[str],
    format: str = "native",
    *,
    out: str | os.PathLike[str],
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes a packed model in a file format. The weights are the same numbers; one layer is read at a time.

    Everything is written into ``<out>.partial``, which becomes ``out`` when it is whole. A model of which nothing is quantized is
    written too, where the format holds such models.

    Args:
        checkpoint: a directory that ``lowbit quantize`` wrote, a directory or file in one of the formats, or a hub id of either;
            or an ordinary model.
        format: the name of a format; ``lowbit plan`` lists them. ``gguf:f16`` is a format with an option.
        out: the directory to write, which must not exist or be empty.
        trust_remote_code: lets the model's own Python code run, where its class has to be known.

    Returns:
        What was written.

    Raises:
        ValueError: an unknown format, a target that exists, a directory that is no lowbit checkpoint, or a model that the
            format cannot hold, with the reason. Nothing is written then.
    """
    file_format, out = find_format(format), check_target(Path(out).expanduser())
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise OutputError(
            f"{partial} exists: a run or an export did not finish there. Finish it or remove it, or choose another -o DIR"
        )
    path, packed = open_packed(checkpoint, trust_remote_code=trust_remote_code)
    if packed is not None:
        model, skeleton = packed, skeleton_of(packed.config)
    elif file_format.holds_plain and not is_native(read_checkpoint(path).config):
        model, skeleton = _plain(open_model(path, trust_remote_code=trust_remote_code))
    elif not is_native(read_checkpoint(path).config):
        raise ValueError(
            f"{checkpoint}: nothing is packed in it, and {file_format.title} holds packed models only; `lowbit quantize` packs a model"
        )
    else:
        model = Native().read(path)
        source = open_model(path, trust_remote_code=trust_remote_code, allow_quantized=True)
        skeleton = source.skeleton(unfuse=True)
    if not file_format.turns_residual:
        model = folded(model, skeleton.config)
    beside = next((file.parent for file in model.files), path)
    biases = new_biases(model.description, skeleton)
    reason = file_format.why_not(model.description, biases, skeleton.config)
    reason = reason or file_format.why_not_files(beside, skeleton.config)
    if reason is not None:
        raise ValueError(f"{checkpoint} cannot be written as {file_format.title}: {reason}")
    partial.mkdir(parents=True)
    try:
        file_format.write(model, partial)
        rewrite_card(partial, file_format.name)
        if out.exists():
            out.rmdir()  # empty: checked above
        os.replace(partial, out)  # noqa: PTH105  (atomic on every system)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # its own type for a full disk
            raise OutputError(f"{partial} could not be written ({error}); make room there and repeat") from error
        raise
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    note = file_format.note(model.description)
    return ExportReport(out, file_format.name, len(model.description.layers), size, note)


def _plain(source: ModelSource) -> tuple[PackedModel, PreTrainedModel]:
    """A model of which nothing is quantized, as a stream, and its skeleton."""
    skeleton = source.skeleton()
    tied: Any = skeleton.all_tied_weights_keys
    names = [name for name in skeleton.state_dict() if name not in tied]

    def parts() -> Iterator[PlainTensor]:
        for name in names:
            source.load(skeleton, [name], dtype=None)
            yield PlainTensor(name, skeleton.state_dict()[name])
            source.release_tensors(skeleton, [name])

    files = tuple(
        file for file in sorted(source.path.iterdir()) if file.is_file() and file.suffix in (".json", ".jinja")
    )
    config = plain_config(source.config, source.dtype)
    return PackedModel(ModelDescription({}), config, parts, files), skeleton


def skeleton_of(config: Mapping[str, Any]) -> Any:
    """The model that a config.json describes, without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    described = AutoConfig.for_model(**config)
    with init_empty_weights(include_buffers=False):
        return auto_class(described).from_config(described)


def new_biases(description: ModelDescription, skeleton: nn.Module) -> Collection[str]:
    """Names of the packed linears that have a bias though the model's class, of which ``skeleton`` is one, gives them none."""
    return [
        name
        for name, layer in description.layers.items()
        if layer.bias is not None and getattr(skeleton.get_submodule(name), "bias", None) is None
    ]
