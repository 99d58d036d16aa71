"""Fisher information of the recorded layers, by the protocol of the official records, gathered once and cached.

``F = sum over calibration windows of (dL/dW)^2``, L the mean next-token cross-entropy of one window of 512 tokens, in
float32, by autograd over the whole model: independent of the streaming pass that it serves to check.

`python tests/golden/gradients.py` gathers it (minutes on one core) and says where it is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

import layers


def gather(where: str = "") -> dict[str, Tensor]:
    """``{layer}``: float32 ``[O, I]`` for each of ``layers.LAYERS`` whose name holds ``where``.

    The backward pass goes no further down than the first of them.
    """
    wanted = [layer for layer in layers.LAYERS if where in layer]
    name = f"official-fisher-smollm2-135m{where.replace('.', '-')}-32x512"
    return layers.cached(name, lambda: of_layers(wanted))


def of_layers(wanted: list[str]) -> dict[str, Tensor]:
    """:func:`gather` for ``wanted``, without a cache."""
    model, tokenizer = layers.model_and_tokenizer()
    model.requires_grad_(False)
    weights = {layer: model.get_parameter(f"{layer}.weight").requires_grad_() for layer in wanted}
    fisher = {layer: torch.zeros_like(weight) for layer, weight in weights.items()}
    for window in layers.windows_of("calibration", tokenizer):
        logits = model(window[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:])
        for layer, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            fisher[layer] += gradient.square()
    return fisher


if __name__ == "__main__":
    print(layers.missing() or f"{len(gather())} tensors in {layers.CACHE}")
