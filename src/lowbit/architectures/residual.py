"""Rotating the residual stream: one orthogonal matrix R for all of a model, folded into every block (QuaRot, arXiv:2404.00456).

An RMSNorm divides a token by its length, which R does not change, so that norm(h R) = norm(h) R once the norm has no gain:
the gain g goes into what reads the norm, W diag(g) R, and what writes to the stream takes R^T W. Each block's fold depends
on R alone, so a model that is streamed block by block rotates block by block. Where the stream begins and ends it is turned
at run time (:mod:`lowbit.modules.residual`): embeddings and head stay as they are stored, and tied where they are tied.

Law: the model computes the same function (tests/laws/test_residual.py, every table that does not say why it cannot).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.architectures.resolved import ResolvedResidual
from lowbit.transforms import ChannelTransform


def rotate_residual(
    residual: ResolvedResidual, rotation: ChannelTransform, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of a block's state_dict that change when the stream it reads and writes is ``rotation.forward(h)``.

    weights: the block's state_dict, matrices `[O, I]` as drafts have them; neither it nor its tensors change. rotation: orthogonal, of the stream's width. The
    result is float64, so that the caller rounds once; gains are one.

    ValueError: a stream that cannot be rotated, with the reason.
    """
    if residual.fixed:
        raise ValueError(f"The residual stream cannot be rotated: {residual.fixed}.")
    changed: dict[str, Tensor] = {}
    for edge in residual.edges:
        (norm,) = edge.producers
        assert norm.norm and not norm.has_bias, (
            f"{norm.module} is not an RMSNorm, so a rotation does not commute with it"
        )
        gain = weights[norm.weight].double() + norm.gain_offset
        changed[norm.weight] = gain.new_full(gain.shape, 1.0 - norm.gain_offset)
        for port in edge.consumers:
            changed[port.weight], _ = rotation.fold_in(weights[port.weight].double() * gain, None)
    for port in residual.writers:
        bias = weights[port.bias].double() if port.has_bias else None
        changed[port.weight], b = rotation.fold_out(weights[port.weight].double(), bias)
        if b is not None:
            changed[port.bias] = b
    return changed
