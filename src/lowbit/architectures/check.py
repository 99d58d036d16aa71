"""The proof of a table: every legal transform at every edge leaves the model's function unchanged.

It runs in float64 on a small model with random parameters, also in norms and biases, so that no transform is an identity
by accident. transformers computes norms, rotary angles, routing and some softmaxes in float32 for every model dtype. That
rounding would hide errors below 1e-7, so the check replaces float32 with float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lowbit.architectures.experts import unfuse_experts
from lowbit.architectures.fold import add_bias, fold, needs_bias
from lowbit.architectures.resolve import block_modules, resolve
from lowbit.architectures.resolved import ResolvedBlock, ResolvedEdge
from lowbit.architectures.table import Architecture, Kind
from lowbit.modules import make_drafts
from lowbit.transforms import ChannelTransform, Permute, Rotate, Scale, Shift

TOLERANCE = 1e-9
"""Largest accepted change of any logit, relative to the largest logit."""

SENSITIVITY = 1e-6
"""Smallest accepted change when only the first port is folded: it shows that the edge has an effect in this model."""


class float64_everywhere(TorchFunctionMode):
    """A context in which torch functions use float64 instead of float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def check_architecture(model: PreTrainedModel, architecture: Architecture, *, seed: int = 0) -> list[str]:
    """Proves the table on a small model.

    Each fold of a random transform must leave the logits unchanged; readers of a shared input must read one tensor; stages
    must follow the order of execution; every matrix of a block must be listed; judges must exist.

    Args:
        model: any causal language model with few, narrow blocks (two are enough). It is changed: its experts are unfused,
            its linears become drafts and its parameters random.
        architecture: the table.
        seed: of parameters, tokens and transforms.

    Returns:
        "block.edge kind" for each proved pair.

    Raises:
        ValueError: the table does not fit the model.
        AssertionError: a fold changed the logits, or the model contradicts a shared input or stage; names which.
    """
    unfuse_experts(model)
    randomize(model.double().eval(), seed)
    tokens = torch.randint(0, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(seed))
    before = logits(model, tokens)
    proved = []
    for number, block in enumerate(block_modules(model, architecture)):
        resolved = drafted(architecture, block, model.config)
        assert not resolved.other_matrices, f"the table says nothing about {resolved.other_matrices}"
        check_inputs(model, tokens, block, resolved)
        for edge in resolved.edges:
            block.get_submodule(edge.judge)
            first_port_alone = dataclasses.replace(edge, ports=edge.ports[:1])
            for kind in sorted(edge.carries, key=lambda k: k.value):
                label = f"{number}.{edge.name} {kind.value}"
                transform = random_transform(edge, kind, seed)
                change = change_of_logits(model, tokens, before, block, edge, transform)
                assert change <= TOLERANCE, f"{label}: logits changed by {change:.1e} of their maximum"
                change = change_of_logits(model, tokens, before, block, first_port_alone, transform)
                assert change >= SENSITIVITY, f"{label}: half a fold changed nothing, so the whole fold proves nothing"
                proved.append(label)
    return proved


def drafted(architecture: Architecture, block: nn.Module, config: Any) -> ResolvedBlock:
    """The table on `block`, every linear of which with a role becomes a draft, in place."""
    make_drafts(block, resolve(architecture, block, config).linears)
    return resolve(architecture, block, config)


def check_inputs(model: nn.Module, tokens: Tensor, block: nn.Module, resolved: ResolvedBlock) -> None:
    """Asserts that readers of a shared input read one tensor and that stages run in their order."""
    seen: dict[str, Tensor] = {}

    def remember(path: str) -> Callable[[nn.Module, tuple], None]:
        return lambda _, args: seen.update({path: args[0]})

    hooks = [block.get_submodule(path).register_forward_pre_hook(remember(path)) for path in resolved.linears]
    try:
        logits(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    unused = [path for path in resolved.linears if path not in seen]
    assert not unused, f"{unused} saw no token, so nothing is proved about them; try another seed"
    for shared in resolved.shared_inputs:
        first, *others = (seen[path] for path in shared.readers)
        assert all(torch.equal(first, other) for other in others), f"{shared.name}: its readers read different tensors"
    order = {path: position for position, path in enumerate(seen)}
    starts = [min(order[path] for path in stage) for stage in resolved.stages]
    assert starts == sorted(starts), f"stages {resolved.stages} run in the order {list(order)}"


def randomize(model: nn.Module, seed: int) -> None:
    """Makes every parameter random, in place.

    Embeddings become N(0, 1), so that tokens differ; other matrices N(0, 1 / fan in); gains and biases N(0, 1) pushed away
    from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            values += 0.3 * values.sign()
        elif id(parameter) not in embeddings:
            values *= parameter.shape[-1] ** -0.5
        parameter.data.copy_(values)


def random_transform(edge: ResolvedEdge, kind: Kind, seed: int) -> ChannelTransform:
    """A random transform of this kind that the edge accepts and that is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    run = edge.within or edge.channels
    if kind is Kind.SCALE:
        s = torch.rand(edge.channels, generator=generator, dtype=torch.float64) * 2.7 + 0.3
        sign = torch.randn(edge.channels, generator=generator).sign()
        return Scale(s if edge.positive else s * sign)
    if kind is Kind.SHIFT:
        return Shift(torch.randn(edge.channels, generator=generator, dtype=torch.float64))
    if kind is Kind.PERMUTE:
        runs = range(0, edge.channels, run)
        return Permute(torch.cat([start + torch.randperm(run, generator=generator) for start in runs]))
    if kind is Kind.ROTATE:
        return Rotate(torch.stack([Rotate.random_orthogonal(run, seed + r).q for r in range(edge.channels // run)]))
    raise ValueError(f"No random transform of kind {kind}.")


def change_of_logits(
    model: nn.Module,
    tokens: Tensor,
    before: Tensor,
    block: nn.Module,
    edge: ResolvedEdge,
    transform: ChannelTransform,
) -> float:
    """Largest change of a logit, relative to the largest logit, with `transform` folded across `edge` of `block`."""
    with folded(block, edge, transform):
        return float((logits(model, tokens) - before).abs().max() / before.abs().max())


@contextlib.contextmanager
def folded(block: nn.Module, edge: ResolvedEdge, transform: ChannelTransform) -> Iterator[None]:
    """Folds `transform` across the edge while open. On leaving, weights are restored; added zero biases stay."""
    if isinstance(transform, Shift):
        add_bias(block, needs_bias(edge, Kind.SHIFT))
    old = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block.load_state_dict(fold(edge, transform, old), strict=False)
    try:
        yield
    finally:
        block.load_state_dict(old)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] in float64 throughout."""
    with float64_everywhere():
        return model(input_ids=tokens, use_cache=False).logits
