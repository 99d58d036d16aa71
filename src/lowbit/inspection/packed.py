"""inspect of a checkpoint: what its packed weights read, behind folded transforms and those that run with the layer.

Shapes: O output channel, I input channel, T token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import for_config, model_blocks
from lowbit.checkpoints import native
from lowbit.checkpoints.source import ModelSource
from lowbit.inspection.rows import InputRow, LayerRow, input_row
from lowbit.modules import QuantLinear, weight_shape
from lowbit.progress import Progress


class _Seen:
    """Largest magnitudes of what one linear reads."""

    def __init__(self) -> None:
        self.peak_I: Tensor | None = None
        self.peaks_T: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1]).abs().float()
        peak_I = x_TI.amax(0)
        self.peak_I = peak_I if self.peak_I is None else torch.maximum(self.peak_I, peak_I)
        self.peaks_T.append(x_TI.amax(1))


def _listen(linear: nn.Module) -> _Seen:
    """Notes what the weight of ``linear`` is multiplied with from now on."""
    seen = _Seen()
    if isinstance(linear, QuantLinear):
        product = linear.product

        def noting(x: Tensor) -> Tensor:
            seen.add(x)
            return product(x)

        linear.product = noting
    else:
        linear.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0]))
    return seen


@torch.no_grad()
def look_at_packed(
    source: ModelSource, ids: Tensor, progress: Progress
) -> tuple[list[LayerRow], list[InputRow], dict[str, Tensor]]:
    """The linears of a checkpoint, their inputs, and the largest magnitude of every channel of every input.

    Args:
        source: a native checkpoint.
        ids: windows of tokens, int64 [N, T].
    """
    model: Any = native.load(source.path, dtype=torch.float32, trust_remote_code=source.trust_remote_code)
    skeleton = source.skeleton(unfuse=True)
    blocks = model_blocks(skeleton, for_config(source.config), source.config)
    seen = {
        f"{block.name}.{shared.name}": _listen(model.get_submodule(f"{block.name}.{shared.readers[0]}"))
        for block in blocks
        for shared in block.resolved.shared_inputs
    }
    for number, window in enumerate(ids):
        progress(number, len(ids), f"window {number + 1} of {len(ids)}")
        model(window[None], use_cache=False)
    rows: list[LayerRow] = []
    inputs: list[InputRow] = []
    channels: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        for shared in block.resolved.shared_inputs:
            name = f"{block.name}.{shared.name}"
            readers = tuple(f"{block.name}.{path}" for path in shared.readers)
            found = seen[name]
            if found.peak_I is not None:
                channels[name] = found.peak_I
                peak_T = torch.cat(found.peaks_T)
                shape = (ids.shape[0], ids.shape[1])
                inputs.append(input_row(name, shared.name, number, readers, found.peak_I, peak_T, shape))
            for path, full in zip(shared.readers, readers, strict=True):
                rows.append(_layer_row(model.get_submodule(full), full, block.resolved.linears[path], name))
    return rows, inputs, channels


def _layer_row(linear: Any, name: str, role: str, shared: str) -> LayerRow:
    packed = isinstance(linear, QuantLinear)
    weight = linear.dequantize() if packed else linear.weight.float()
    shape = linear.description.shape if packed else weight_shape(linear)
    low, high = torch.aminmax(weight)
    return LayerRow(name, role, shared, (shape[0], shape[1]), low.item(), high.item(), weight.std().item(), None)
