"""What is done to all packed layers of a model: repacked for this machine's kernels and back, and decoded once for many inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowbit import kernels
from lowbit.modules.quant_embedding import QuantEmbedding
from lowbit.modules.quant_linear import QuantLinear


def prepare(model: nn.Module) -> None:
    """:meth:`QuantLinear.prepare` of every packed layer of ``model``, one after another: beside the model, one layer is in
    memory twice. Layers that the compiled kernels do not take stay as they are. Warns where there are no such kernels."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if layers and not kernels.native.instruction_sets():
        warnings.warn(
            "lowbit was installed without its compiled kernels: packed layers run by the torch reference, which is slow. "
            "Install a C++ compiler (g++ 11 or newer) and reinstall lowbit",
            stacklevel=2,
        )
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            try:
                module.prepare()
            except ValueError as error:
                raise ValueError(f"tensor {name}.{error}" if name else f"tensor {error}") from error


def restore(model: nn.Module) -> None:
    """:meth:`QuantLinear.restore` of every packed layer of ``model``: it runs by the kernels that quantized it. A head takes the
    codes of the embedding that it shares its scales with."""
    stored = [module.packed() for module in model.modules() if isinstance(module, QuantEmbedding)]
    codes = {table["scale"].data_ptr(): table["codes"] for table in stored if "scale" in table}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            scale = module._buffers.get("scale") if module.is_tied else None
            module.restore(None if scale is None else codes.get(scale.data_ptr()))


@contextmanager
def kept_weights(module: nn.Module, rows: int) -> Iterator[None]:
    """While open, the packed layers in ``module`` that the reference runs keep their decoded weights, instead of decoding
    them for every input. ``rows``: input vectors of a call."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantLinear)]
    try:
        for layer in layers:
            packed = layer.packed()
            if kernels.choose(packed, rows).run is kernels.reference:
                layer._kept_weight = kernels.reference_weight(packed)
        yield
    finally:
        for layer in layers:
            layer._kept_weight = None
