"""Replaces fused experts with ordinary linears.

transformers stores a layer's experts as two parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]. Hooks, folds
and packed layers cannot address one expert in them. Unfusing replaces them with one small gated MLP for each expert, at
paths like `mlp.experts.3.down_proj`. The alternative, a third axis in every step, would put experts into all of the code.
The price is a loop over experts instead of one grouped product; quantized experts need this loop anyway.

Law: the new module gives the same output. Fused modules are recognized by their structure; those that compute anything
except down(act(gate) * up) are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class Expert(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) without biases. x: [T, H]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: Activation) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UnfusedExperts(nn.ModuleList):
    """A ModuleList of `Expert`s with the call signature of the fused module that it replaces."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts.

        hidden_states [T, H], top_k_index [T, k] int64, top_k_weights [T, k] -> [T, H]. Experts without tokens are not
        called; an index without an expert contributes nothing.
        """
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, slot = torch.where(top_k_index == number)
            if len(token):
                weighted = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                out.index_add_(0, token, weighted.to(out.dtype))
        return out


def unfuse_experts(module: nn.Module) -> list[str]:
    """Replaces every fused-experts module inside `module`, in place, and returns their paths.

    The new parameters are copies with the same dtype and device; meta parameters stay meta.

    Raises:
        ValueError: a fused module that computes something other than plain gated experts.
    """
    paths = [path for path, child in module.named_modules() if is_fused(child)]
    for path in paths:
        if not path:
            raise ValueError("unfuse_experts cannot replace the module it was given; pass the block that holds it.")
        fused = module.get_submodule(path)
        _require_plain(path, fused)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, _unfused(fused).train(fused.training))
    return paths


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds the weights of all its experts in two three-dimensional parameters."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].dim() == 3 for name in ("gate_up_proj", "down_proj"))


def _require_plain(path: str, fused: nn.Module) -> None:
    """Raises ValueError if the module has anything that an `Expert` does not reproduce."""
    gate = getattr(type(fused), "_apply_gate", None)
    signature = [name for name in inspect.signature(type(fused).forward).parameters if name != "self"]
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    _, hidden, inner = down.shape
    problems = {
        "other parameters": {name for name, _ in fused.named_parameters()} != {"gate_up_proj", "down_proj"},
        "no act_fn": not callable(getattr(fused, "act_fn", None)),
        "its own gate function": gate is not None and gate.__name__ != "_default_apply_gate",
        "transposed weights": getattr(fused, "is_transposed", False),
        "interleaved gate and up": not getattr(fused, "is_concatenated", True),
        f"a call of {signature}": signature != ["hidden_states", "top_k_index", "top_k_weights"],
        f"gate_up_proj of shape {tuple(gate_up.shape)}": gate_up.shape[1:] != (2 * inner, hidden),
    }
    differences = [name for name, present in problems.items() if present]
    if differences:
        raise ValueError(
            f"Experts at {path!r} ({type(fused).__name__}) have {', '.join(differences)}; expected plain gated experts "
            "down(act(gate) * up) that take hidden_states, top_k_index, top_k_weights. They cannot be unfused."
        )


def _unfused(fused: nn.Module) -> UnfusedExperts:
    gate_up_E, down_E = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    experts = []
    for gate_up, down in zip(gate_up_E.detach(), down_E.detach(), strict=True):
        gate, up = gate_up.chunk(2)
        expert = Expert(gate, up, down, cast("Activation", fused.act_fn))
        experts.append(expert.requires_grad_(down_E.requires_grad))
    return UnfusedExperts(experts)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear with its own copy of `weight`, so that the fused parameter can be freed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    return linear
