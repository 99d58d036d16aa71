"""What a step works on: one block, its formats, and what earlier steps have decided about it.

Steps know nothing of shards, files or other blocks. They see a block in float32 whose transforms so far are folded in,
run windows of calibration tokens through it, and leave their decisions here: folded weights, clip shares, static
activation ranges, and at last packed linears in place of the original ones. The walk owns everything else, so the same
steps serve a streamed model and a single linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbit.architectures import Kind, ResolvedBlock, ResolvedEdge, add_bias, fold, needs_bias
from lowbit.modules import ActSpec
from lowbit.numerics import Affine, Clipped, Fisher, Spec, Statistic
from lowbit.transforms import ChannelTransform, Permute, Scale

Stats = Mapping[Statistic, Tensor]


@dataclass(frozen=True)
class LinearFormat:
    """How one linear will be stored and how its input is quantized at run time (None: not at all)."""

    weight: Spec
    act: ActSpec | None = None


@dataclass
class BlockIO:
    """Calibration windows at one block.

    Attributes:
        x: ``[N, T, d]``, the inputs that steps see: from the quantized blocks before, or from the original ones.
        y: ``[N, T, d]`` or None, what the original block gives for the original inputs: the target of learning.
        call: runs a block on one or more windows ``[B, T, d]`` and returns its hidden states.
    """

    x: Tensor
    y: Tensor | None
    call: Callable[[nn.Module, Tensor], Tensor]

    def window(self, i: int) -> Tensor:
        return self.x[i : i + 1].float()

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class LayerRecord:
    """What the report says of one linear.

    ``error``: relative squared output error on calibration tokens, or None. ``zeroed``: share of the granules that were
    not zero and came out all zero.
    """

    name: str
    role: str
    bits_per_weight: float
    weights: int
    error: float | None = None
    zeroed: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class BlockState:
    """See the module docstring. ``io`` is None for data-free recipes.

    ``store_dtype`` is the dtype in which unquantized parameters (norm gains) will be saved; a commit rounds to it, so
    that later steps see what the saved model will have. ``fisher``: Fisher information ``[O, I]`` of the linears' weights as
    they are now, by path; empty where no step of the recipe needs it.
    """

    name: str
    block: nn.Module
    resolved: ResolvedBlock
    formats: dict[str, LinearFormat]
    io: BlockIO | None
    seed: int = 0
    store_dtype: torch.dtype = torch.float32
    tick: Callable[[str], None] = lambda what: None
    clip: dict[str, Clipped] = field(default_factory=dict)
    act_params: dict[str, Affine] = field(default_factory=dict)
    pre: dict[str, tuple[ChannelTransform, ...]] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def full_name(self, path: str) -> str:
        return f"{self.name}.{path}" if self.name else path

    def note(self, text: str) -> None:
        """A named warning for the report; said once a block."""
        if text not in self.notes:
            self.notes.append(text)

    # Weights

    def linear(self, path: str) -> nn.Module:
        return self.block.get_submodule(path)

    def weight_OI(self, path: str) -> Tensor:
        """The weight of a linear that is not quantized yet, ``[O, I]``, detached."""
        return stored_as_OI(self.linear(path), self.block.get_parameter(f"{path}.weight").detach())

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters by name: what transforms fold into."""
        return dict(self.block.named_parameters())

    # Edges

    def edges(self, at: Iterable[str], kind: Kind) -> Iterator[ResolvedEdge]:
        """Edges whose name matches one of the patterns ``at`` and that carry ``kind``; what is left out is noted."""
        for pattern in at:
            found = [edge for edge in self.resolved.edges if fnmatch(edge.name, pattern)]
            if not found:
                self.note(f"no edge {pattern!r} in this architecture: its {kind.value} is not applied")
            for edge in found:
                if kind in edge.carries:
                    yield edge
                else:
                    self.note(f"edge {edge.name!r} cannot carry a {kind.value} here: not applied")

    def commit(self, edge: ResolvedEdge, transform: ChannelTransform, kind: Kind) -> None:
        """Folds ``transform`` into the block, in place. An edge without a producer applies it to the input at run time.

        Raises:
            ValueError: a transform under which the Fisher information that a later step needs is not known.
        """
        with torch.no_grad():
            add_bias(self.block, needs_bias(edge, kind))
            parameters = self.weights()
            self.fisher |= self._folded_fisher(edge, transform, parameters)
            for name, value in fold(edge, transform, parameters).items():
                stored = value.to(self.store_dtype).to(value.dtype) if value.dim() == 1 else value
                parameters[name].copy_(stored)
        if not edge.producers:
            for port in edge.consumers:
                self.pre[port.module] = (*self.pre.get(port.module, ()), transform)
                self.linear(port.module).register_forward_pre_hook(lambda _, args: (transform.forward(args[0]),))

    def _folded_fisher(
        self, edge: ResolvedEdge, transform: ChannelTransform, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the commit of ``transform`` changes in ``fisher``.

        Where the new weights are ``A w``, gradients are multiplied by ``A^-T``: by 1/s where weights are by s, and a
        permutation moves both alike. So the very fold of the weights serves, on square roots, with the reciprocal scale.
        Mixing channels needs the covariance of gradients, and a shift their sums; the diagonal has neither.
        """
        ports = {port.module for port in edge.ports} & self.fisher.keys()
        if not ports:
            return {}
        if not isinstance(transform, Scale | Permute):
            raise ValueError(
                f"{self.full_name(edge.name)}: the Fisher information behind a {type(transform).__name__} does not follow "
                "from that before it; leave that step out, or choose a solver that needs no Fisher information"
            )
        for_gradients = Scale(1 / transform.s) if isinstance(transform, Scale) else transform
        roots = {f"{path}.weight": stored_as_OI(self.linear(path), self.fisher[path].sqrt()) for path in ports}
        folded = fold(edge, for_gradients, {**parameters, **roots})
        changed = {path: folded[f"{path}.weight"] for path in ports if f"{path}.weight" in folded}
        return {path: stored_as_OI(self.linear(path), root).square() for path, root in changed.items()}

    # Calibration

    def readers(self) -> dict[str, str]:
        """First reader -> name, for every shared input that a linear to be quantized reads."""
        wanted = {}
        for shared in self.resolved.shared_inputs:
            if any(path in self.formats for path in shared.readers):
                wanted[shared.readers[0]] = shared.name
        return wanted

    def collect(self, needs: Iterable[Statistic], inputs: Iterable[str] | None = None) -> dict[str, Stats]:
        """One forward over the calibration windows: statistics of each shared input (all, or those named), by name.

        An input that saw no token (an expert that was never chosen) has no statistics: an empty mapping. What is not of
        inputs is passed over: :meth:`stats_of` adds it.

        Raises:
            ValueError: there is no calibration data.
        """
        needs = tuple(need for need in needs if need.of_input)
        first = {name: path for path, name in self.readers().items() if inputs is None or name in inputs}
        gathered: dict[str, dict[Statistic, Tensor]] = {name: {} for name in first}
        if not needs:
            return dict(gathered)
        if self.io is None:
            raise ValueError(f"{self.full_name('')}: this recipe needs calibration text ({needs[0]}); none was given")

        def gather(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                x_TI = args[0].detach().flatten(0, -2)
                if len(x_TI):
                    for need in needs:
                        gathered[name][need] = need.update(gathered[name].get(need), x_TI)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name, path in first.items():
                handle = self.linear(path).register_forward_pre_hook(gather(name))
                stack.callback(handle.remove)
            for i in range(len(self.io)):
                self.io.call(self.block, self.io.window(i))
                self.tick("calibrating")
                if all(need in found and need.enough(found[need]) for found in gathered.values() for need in needs):
                    break
        return dict(gathered)

    def stats_of(self, stats: Mapping[str, Stats], path: str) -> Stats:
        """What is known of linear ``path``: statistics of the input it reads, from :meth:`collect`, and of its weight."""
        own = {Fisher(): self.fisher[path]} if path in self.fisher else {}
        for shared in self.resolved.shared_inputs:
            if path in shared.readers:
                return {**stats.get(shared.name, {}), **own}
        raise AssertionError(f"{path} reads no shared input")

    def edge_stat(self, edge: ResolvedEdge, stats: Mapping[str, Stats], need: Statistic) -> Tensor | None:
        """One statistic of the activation at ``edge``; joined over the inputs of several experts; None if no token came."""
        joined: Tensor | None = None
        for name in edge.inputs:
            new = stats.get(name, {}).get(need)
            if new is not None:
                joined = new if joined is None else need.join(joined.clone(), new)
        return joined

    @contextmanager
    def replaced(self, forwards: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """While open, each named linear computes the given function of its input instead."""
        changed = [self.linear(path) for path in forwards]
        try:
            for module, forward in zip(changed, forwards.values(), strict=True):
                module.forward = forward
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)


def stored_as_OI(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``linear`` as ``[O, I]``: GPT-2's Conv1D stores the transpose. Its own inverse."""
    return weight.T if isinstance(linear, Conv1D) else weight
