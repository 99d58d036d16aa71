"""What of a checkpoint vLLM's path cannot run: parts of a model that it computes without asking, and layers whose result depends on
what else is in a call."""

from __future__ import annotations

from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import LinearDescription
from lowbit.numerics import PerGroup, PerToken


def why_not_served(description: ModelDescription) -> str | None:
    """What of a model vLLM's path cannot run; None: nothing."""
    if description.cache or description.kv_calibration:
        return "its cache of keys and values is packed, and vLLM keeps its own; quantize without --kv"
    if description.attention:
        return "the operands of its attention are quantized"
    if description.residual is not None:
        return "its residual stream is rotated between the blocks"
    if description.unfused_experts:
        return "its experts are packed one by one, and vLLM computes them as one"
    refused = ((name, _why_not_layer(layer)) for name, layer in description.layers.items())
    return next((f"{name}: {reason}" for name, reason in refused if reason), None)


def _why_not_layer(description: LinearDescription) -> str | None:
    """Why a layer cannot run where the tokens of several requests are in one call; None: it can."""
    act = description.act
    if act is None or act.static:
        return None
    if act.threshold or not isinstance(act.spec.granularity, PerToken | PerGroup):
        return (
            "its inputs are quantized with ranges of a whole call, in which vLLM joins several requests; quantize "
            "activations per token"
        )
    return None
