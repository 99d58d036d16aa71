"""inspect: streams a model block by block, and measures every linear and its input.

One block of original weights and the hidden states of a few windows are held at a time, as in quantization. One forward
pass both measures a block and makes the next block's input.

Shapes: O output channel, I input channel, T token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.architectures import for_config, model_blocks
from lowbit.checkpoints import native
from lowbit.checkpoints.shards import read_json
from lowbit.checkpoints.source import ModelSource, open_model
from lowbit.checkpoints.target import check_target
from lowbit.checkpoints.to_run import locate_to_run
from lowbit.data import Bos, CalibrationText, calibration_of
from lowbit.evaluation import output_error
from lowbit.inspection.packed import look_at_packed
from lowbit.inspection.rows import ROUNDED, InputRow, Inspection, LayerRow, input_row, markdown
from lowbit.modules import LinearFormat, unmake_drafts
from lowbit.numerics import AbsMax, MinMax, Samples, Statistic, quantize
from lowbit.progress import Progress, silent
from lowbit.stages.stream import Stream
from lowbit.steps import BlockIO, BlockState
from lowbit.surroundings import own_settings
from lowbit.whole_file import write_whole, write_whole_text

_TOKENS = 256  # sampled for a layer's output error


@dataclass(frozen=True)
class TokenPeak(Statistic):
    """Largest magnitude of each token, ``[T]``, in order."""

    def merge(self, x_TI: Tensor) -> Tensor:
        return x_TI.abs().amax(1)

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new])


@own_settings()
def inspect_model(
    model: str | PathLike[str],
    calibration: CalibrationText,
    *,
    samples: int = 8,
    seq_len: int = 512,
    bos: Bos = "auto",
    out: str | PathLike[str] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Runs a few windows of text through ``model``, block by block, and measures every linear and its input.

    Args:
        model, bos, trust_remote_code: as for :func:`lowbit.quantize`; or a directory of packed weights, of lowbit or another tool, whose inputs are seen as its packed
            weights read them, behind every transform. It is loaded whole, and its layers have no error.
        calibration: a text, ``self``, ids ``[N, T]`` or a Calibration.
        samples, seq_len: number of windows of a text, and tokens of each.
        out: a new directory for ``inspection.md``, ``inspection.json``, the plots, and ``channels.safetensors`` (the
            largest magnitude of every channel of every input). None: nothing is written.
        progress: called with finished blocks or windows, all of them, and the current activity.

    Raises:
        ValueError: a model or a text that cannot be used, a directory that is not empty.
    """
    if out is not None:
        out = check_target(Path(out).expanduser())
    source = open_model(model, trust_remote_code=trust_remote_code, allow_quantized=True)
    packed = native.is_native(read_json(source.path / "config.json"))
    if not packed and source.quantization is not None:  # what another tool has packed runs as a checkpoint
        path = locate_to_run(model, trust_remote_code=trust_remote_code)
        if packed := native.is_native(read_json(path / "config.json")):
            opened = open_model(path, trust_remote_code=trust_remote_code, allow_quantized=True)
            source = dataclasses.replace(opened, name=source.name)
    if not packed:
        source = open_model(model, trust_remote_code=trust_remote_code)  # refuses what another tool has quantized
    text = calibration_of(source, calibration, samples, seq_len, bos)
    look = look_at_packed if packed else _look_at_original
    rows, inputs, channels = look(source, text.ids, progress or silent)
    inspection = Inspection(
        source.name,
        f"{text.name}, {list(text.ids.shape)}",
        tuple(rows),
        tuple(inputs),
        (*for_config(source.config).warnings, *text.warnings),
    )
    return inspection if out is None else _write(inspection, channels, Path(out))


def _look_at_original(
    source: ModelSource, ids: Tensor, progress: Progress
) -> tuple[list[LayerRow], list[InputRow], dict[str, Tensor]]:
    rows: list[LayerRow] = []
    inputs: list[InputRow] = []
    channels: dict[str, Tensor] = {}
    for state, behind, total in original_blocks(source, ids):
        block = len({row.block for row in inputs})
        progress(block, total, f"block {block + 1} of {total}")
        new_inputs, new_rows, new_channels = _look(state, behind, block, (ids.shape[0], ids.shape[1]))
        inputs, rows, channels = inputs + new_inputs, rows + new_rows, channels | new_channels
    return rows, inputs, channels


def original_blocks(source: ModelSource, ids: Tensor) -> Iterator[tuple[BlockState, Tensor, int]]:
    """Every block with its original weights and inputs, a tensor to be filled with its outputs, and the number of blocks."""
    model, architecture = source.skeleton(unfuse=True), for_config(source.config)
    blocks = model_blocks(model, architecture, source.config)
    entered: list[Tensor] = []
    calls = Stream(model, architecture).enter_windows(source, ids, lambda _, hidden: entered.append(hidden))
    x = torch.cat(entered)
    behind = torch.empty_like(x)
    for block, call in zip(blocks, calls, strict=True):
        source.load_into(model, block.name)
        formats = {path: LinearFormat(ROUNDED) for path in block.resolved.linears}
        io = BlockIO(x, None, call, by_window=True)
        yield BlockState.of(block.name, block.module, block.resolved, formats, io), behind, len(blocks)
        x, behind = behind, x
        unmake_drafts(block.module)
        source.release(model, block.name)


@torch.no_grad()
def _look(
    state: BlockState, behind: Tensor, block: int, shape: tuple[int, int]
) -> tuple[list[InputRow], list[LayerRow], dict[str, Tensor]]:
    stride = max(1, shape[0] * shape[1] // _TOKENS)
    samples = Samples(_TOKENS, stride)
    needs: tuple[Statistic, ...] = (AbsMax(), TokenPeak(), samples)
    stats = state.collect(needs, behind=behind)
    inputs, rows, channels = [], [], {}
    for shared in state.resolved.shared_inputs:
        seen, name = stats[shared.name], state.full_name(shared.name)
        readers = tuple(state.full_name(path) for path in shared.readers)
        if AbsMax() in seen:
            inputs.append(input_row(name, shared.name, block, readers, seen[AbsMax()], seen[TokenPeak()], shape))
            channels[name] = seen[AbsMax()].float()
        rows += [_layer_row(state, path, name, seen.get(samples)) for path in shared.readers]
    return inputs, rows, channels


def _layer_row(state: BlockState, path: str, shared: str, x_TI: Tensor | None) -> LayerRow:
    w_OI = state.draft(path).weight
    error = None
    if x_TI is not None:
        error = output_error(x_TI @ w_OI.T, x_TI @ quantize(w_OI, ROUNDED, MinMax()).dequantize().T)
    low, high = torch.aminmax(w_OI)
    shape = (w_OI.shape[0], w_OI.shape[1])
    role = state.resolved.linears[path]
    return LayerRow(state.full_name(path), role, shared, shape, low.item(), high.item(), w_OI.std().item(), error)


# Files


def _write(inspection: Inspection, channels: dict[str, Tensor], out: Path) -> Inspection:
    from lowbit.inspection import plots  # matplotlib takes a second to import

    out.mkdir(parents=True, exist_ok=True)
    drawings = plots.drawings(inspection)
    names = ("inspection.md", "inspection.json", "channels.safetensors", *drawings)
    inspection = dataclasses.replace(inspection, files=tuple(out / name for name in names))
    for name, draw in drawings.items():
        write_whole(out / name, partial(draw(inspection, channels).savefig, dpi=110))
    write_whole(out / "channels.safetensors", partial(save_file, channels))
    write_whole_text(out / "inspection.json", json.dumps(inspection.to_dict(), indent=2) + "\n")
    write_whole_text(out / "inspection.md", markdown(inspection))
    return inspection
