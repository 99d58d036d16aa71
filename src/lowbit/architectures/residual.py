"""Rotates the residual stream: one orthogonal matrix R for a whole model, folded into every block (QuaRot, arXiv:2404.00456).

An RMSNorm divides a token by its length, which R does not change, so norm(h R) = norm(h) R for a norm without a gain. The
gain g moves into the readers of the norm, W diag(g) R, and the writers to the stream become R^T W. The fold of a block
depends only on R, so a model that is streamed block by block can rotate block by block. At both ends the stream is rotated
at run time (:mod:`lowbit.modules.residual`), so embeddings and head stay as stored, and tied if they are tied.

Law: the model computes the same function (tests/laws/test_residual.py, for every table that does not name a reason).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.architectures.resolved import ResolvedResidual
from lowbit.transforms import ChannelTransform


def rotate_residual(
    residual: ResolvedResidual,
    rotation: ChannelTransform,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The entries of a block's state_dict that change when the block reads and writes ``rotation.forward(h)``.

    Args:
        residual: the stream of the block.
        rotation: orthogonal, of the stream's width.
        weights: the block's state_dict with matrices ``[O, I]``, as in drafts; not changed.
        dtype: of the products.

    Returns:
        Entries in ``dtype``, so that the caller rounds once; gains become one. Gradients reach the rotation.

    Raises:
        ValueError: the stream cannot be rotated; the message says why.
    """
    if residual.fixed:
        raise ValueError(f"The residual stream cannot be rotated: {residual.fixed}.")
    changed: dict[str, Tensor] = {}
    for edge in residual.edges:
        (norm,) = edge.producers
        assert norm.norm and not norm.has_bias, (
            f"{norm.module} is not an RMSNorm, so a rotation does not commute with it"
        )
        gain = weights[norm.weight].to(dtype) + norm.gain_offset
        changed[norm.weight] = gain.new_full(gain.shape, 1.0 - norm.gain_offset)
        for port in edge.consumers:
            changed[port.weight], _ = rotation.fold_in(weights[port.weight].to(dtype) * gain, None)
    for port in residual.writers:
        bias = weights[port.bias].to(dtype) if port.has_bias else None
        changed[port.weight], b = rotation.fold_out(weights[port.weight].to(dtype), bias)
        if b is not None:
            changed[port.bias] = b
    return changed
