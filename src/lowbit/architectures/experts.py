"""Replaces fused experts with ordinary linears.

transformers stores a layer's experts as two parameters, `gate_up_proj` [E, 2 I, H] (`up_proj` [E, I, H] where there is no
gate) and `down_proj` [E, H, I]. Hooks, folds and packed layers cannot address one expert in them. Unfusing replaces them with
one small MLP for each expert, at paths like `mlp.experts.3.down_proj`. The alternative, a third axis in every step, would
put experts into all of the code. The price is a loop over experts instead of one grouped product; quantized experts need
this loop anyway.

Fused modules differ in how they store (transposed, gate and up interleaved, biases) and in what they do between the two
products. An `ExpertLayout` says the first; the second stays the fused module's own function. Law: the new module gives the
same output. Modules of another structure are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROUTED = (["hidden_states", "top_k_index", "top_k_weights"], ["hidden_states", "router_indices", "routing_weights"])
_SORTED = ["hidden_states"]


@dataclass(frozen=True)
class ExpertLayout:
    """How a fused module stores one expert.

    Args:
        gated: `gate_up_proj` holds gate and up; else there is `up_proj` alone.
        transposed: weights are [I, O], not [O, I].
        interleaved: rows (or columns) of gate and up alternate; else the gate's come first.
    """

    gated: bool
    transposed: bool
    interleaved: bool

    @property
    def first(self) -> str:
        """The parameter that reads the hidden states."""
        return "gate_up_proj" if self.gated else "up_proj"

    def parts(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """One expert's share of a fused parameter (a weight, or a bias named `..._bias`) by its linears' parameters."""
        is_bias = parameter.endswith("_bias")
        leaf, projection = ("bias" if is_bias else "weight"), parameter.removesuffix("_bias")
        value = value if is_bias or not self.transposed else value.T
        if projection != "gate_up_proj":
            return {f"{projection}.{leaf}": value}
        gate, up = (value[::2], value[1::2]) if self.interleaved else value.chunk(2)
        return {f"gate_proj.{leaf}": gate, f"up_proj.{leaf}": up}

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the fused product would give, [T, 2 I], from the products of gate and up."""
        return torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)


class Expert(nn.Module):
    """down_proj(between(gate_proj(x), up_proj(x))), or down_proj(between(up_proj(x))) without a gate. x: [T, H]."""

    def __init__(self, parameters: dict[str, Tensor], between: Callable[..., Tensor]) -> None:
        super().__init__()
        for projection in ("gate_proj", "up_proj", "down_proj"):
            if f"{projection}.weight" in parameters:
                linear = _linear(parameters[f"{projection}.weight"], parameters.get(f"{projection}.bias"))
                self.add_module(projection, linear)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        inner = (m(x) for name, m in self._modules.items() if m is not None and name != "down_proj")  # gate first
        return self.get_submodule("down_proj")(self.between(*inner))


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


class SortedExperts(nn.ModuleList):
    """As `UnfusedExperts`, for a fused module that is given every token once for each expert, weighted before."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [E T, H], zero where an expert was not chosen -> [E T, H]. Only the others are computed."""
        out = torch.zeros_like(hidden_states)
        for expert, rows, results in zip(self, hidden_states.chunk(len(self)), out.chunk(len(self)), strict=True):
            token = torch.where(rows.any(-1))[0]
            if len(token):
                results[token] = expert(rows[token]).to(out.dtype)
        return out


def unfuse_experts(module: nn.Module) -> list[str]:
    """Replaces every fused-experts module inside `module`, in place, and returns their paths.

    The new parameters are copies with the same dtype and device; meta parameters stay meta.

    Raises:
        ValueError: a fused module of a structure that is not known.
    """
    paths = [path for path, child in module.named_modules() if is_fused(child)]
    for path in paths:
        if not path:
            raise ValueError("unfuse_experts cannot replace the module it was given; pass the block that holds it.")
        fused = module.get_submodule(path)
        layout = layout_of(path, fused)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, _unfused(fused, layout).train(fused.training))
    return paths


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds the weights of all its experts in two three-dimensional parameters."""
    own = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return "down_proj" in own and bool(own & {"gate_up_proj", "up_proj"})


def expert_layout(model: nn.Module, path: str) -> ExpertLayout | None:
    """The layout of the fused experts at `path`; None if there are none."""
    module = model.get_submodule(path)
    return layout_of(path, module) if is_fused(module) else None


def layout_of(path: str, fused: nn.Module) -> ExpertLayout:
    """How the fused module at `path` stores its experts.

    Raises:
        ValueError: it has something that an `Expert` does not reproduce.
    """
    own = dict(fused.named_parameters())
    gated = "gate_up_proj" in own
    layout = ExpertLayout(gated, _is_transposed(fused, gated), not getattr(fused, "is_concatenated", True))
    inner, hidden = own["down_proj"].shape[1:] if layout.transposed else own["down_proj"].shape[:0:-1]
    width = 2 * inner if gated else inner
    expected = {layout.first: (hidden, width) if layout.transposed else (width, hidden)}
    expected["down_proj"] = (inner, hidden) if layout.transposed else (hidden, inner)
    if any(name.endswith("_bias") for name in own):
        expected |= {f"{layout.first}_bias": (width,), "down_proj_bias": (hidden,)}
    signature = [name for name in inspect.signature(type(fused).forward).parameters if name != "self"]
    problems = {
        "other parameters": own.keys() != expected.keys(),
        "no known function between its products": not _is_known(fused, gated),
        f"a call of {signature}": signature not in (*_ROUTED, _SORTED),
        "a norm after its experts": bool(getattr(fused, "has_post_expert_norm", False)),
        f"parameters of shapes {[tuple(p.shape) for p in own.values()]}": any(
            own[name].shape[1:] != shape for name, shape in expected.items() if name in own
        ),
    }
    differences = [name for name, present in problems.items() if present]
    if differences:
        raise ValueError(
            f"Experts at {path!r} ({type(fused).__name__}) have {', '.join(differences)}; expected experts of two fused "
            "products, down(between(gate_up)), that take hidden_states and for each token its experts and their weights. "
            "They cannot be unfused."
        )
    return layout


def _is_known(fused: nn.Module, gated: bool) -> bool:
    """Whether it is known what lies between the products: said by transformers' decorator, or plain to read in the code."""
    if hasattr(fused, "has_gate"):
        return bool(fused.has_gate) == gated and (
            callable(getattr(fused, "act_fn", None)) or _own_gate(fused) is not None
        )
    plain = r"self\.act_fn\(gate\w*\) \* up|up\w* \* self\.act_fn\(gate\w*\)"
    return gated and callable(getattr(fused, "act_fn", None)) and bool(re.search(plain, source_of(type(fused).forward)))


def source_of(code: Any) -> str:
    """The code of a class or function; empty where it has no file."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


def _own_gate(fused: nn.Module) -> Callable[..., Tensor] | None:
    own = getattr(type(fused), "_apply_gate", None)
    return None if own is None or own.__name__ == "_default_apply_gate" else own


def _is_transposed(fused: nn.Module, gated: bool) -> bool:
    declared = getattr(fused, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    first, down = fused.get_parameter("gate_up_proj" if gated else "up_proj"), fused.get_parameter("down_proj")
    return first.shape[1] == down.shape[2] and first.shape[2] == (2 if gated else 1) * down.shape[1]


def _between(fused: nn.Module, layout: ExpertLayout) -> Callable[..., Tensor]:
    """What the fused module does between its products, as a function of gate and up, or of up."""
    act: Any = getattr(fused, "act_fn", None)
    if not layout.gated:
        return lambda up: act(up)
    if (own := _own_gate(fused)) is None:
        return lambda gate, up: act(gate) * up
    return lambda gate, up: own(fused, layout.joined(gate, up))


def _unfused(fused: nn.Module, layout: ExpertLayout) -> nn.ModuleList:
    own = {name: parameter.detach() for name, parameter in fused.named_parameters()}
    learnable, between = fused.get_parameter("down_proj").requires_grad, _between(fused, layout)
    signature = [name for name in inspect.signature(type(fused).forward).parameters if name != "self"]
    experts = []
    for number in range(len(own["down_proj"])):
        parts = {key: part for name, value in own.items() for key, part in layout.parts(name, value[number]).items()}
        experts.append(Expert(parts, between).requires_grad_(learnable))
    fused._parameters.clear()  # what is left of it only computes what lies between the products
    return (SortedExperts if signature == _SORTED else UnfusedExperts)(experts)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with its own copies of `weight` and `bias`, so that the fused parameters can be freed."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(memory_format=torch.contiguous_format))
    return linear
