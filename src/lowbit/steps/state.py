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

from lowbit.architectures import Kind, Port, ResolvedBlock, ResolvedEdge, add_bias, fold, needs_bias
from lowbit.modules import LinearFormat
from lowbit.numerics import Affine, Clipped, Fisher, Fixed, SideTerm, Statistic
from lowbit.transforms import ChannelTransform, Permute, Scale, Seeded

Stats = Mapping[Statistic, Tensor]


@dataclass
class BlockIO:
    """Calibration windows at one block.

    Attributes:
        x: ``[N, T, d]``, the inputs that steps see: from the quantized blocks before, or from the original ones.
        y: ``[N, T, d]`` or None, what the original block gives for the original inputs: the target of learning.
        call: runs a block on one or more windows ``[B, T, d]`` and returns its hidden states.
        x_fp: ``[N, T, d]``, the inputs from the original blocks; None where they are ``x``.
    """

    x: Tensor
    y: Tensor | None
    call: Callable[[nn.Module, Tensor], Tensor]
    x_fp: Tensor | None = None

    def window(self, i: int, original: bool = False) -> Tensor:
        x = self.x_fp if original and self.x_fp is not None else self.x
        return x[i : i + 1].float()

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
    they are now, by path; empty where no step of the recipe needs it. ``pre``, ``post``: what each linear does itself to its
    input and its output at run time, in the order it is done; until a linear is packed, its hooks do it. ``side``: terms that
    packed linears will have beside their codes; what is not packed yet does without. ``originals``: what packed linears
    replaced, kept where paired statistics are still to be gathered. ``rotated``: the block reads and writes a residual stream
    that was rotated, as ``io`` holds it.
    """

    name: str
    block: nn.Module
    resolved: ResolvedBlock
    formats: dict[str, LinearFormat]
    io: BlockIO | None
    seed: int = 0
    store_dtype: torch.dtype = torch.float32
    tick: Callable[[str], None] = lambda what: None
    clip: dict[str, Clipped | Fixed] = field(default_factory=dict)
    nudge: dict[str, Tensor] = field(default_factory=dict)
    act_params: dict[str, Affine] = field(default_factory=dict)
    pre: dict[str, tuple[ChannelTransform, ...]] = field(default_factory=dict)
    post: dict[str, tuple[ChannelTransform, ...]] = field(default_factory=dict)
    side: dict[str, tuple[SideTerm, ...]] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    rotated: bool = False
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

    def edges(self, at: Iterable[str], kind: Kind, *, note: bool = True) -> Iterator[ResolvedEdge]:
        """Edges whose name matches one of the patterns ``at`` and that carry ``kind``; what is left out is noted."""
        for pattern in at:
            found = [edge for edge in self.resolved.edges if fnmatch(edge.name, pattern)]
            if not found and note:
                self.note(f"no edge {pattern!r} in this architecture: its {kind.value} is not applied")
            for edge in found:
                if kind in edge.carries:
                    yield edge
                elif note:
                    self.note(f"edge {edge.name!r} cannot carry a {kind.value} here: not applied")

    def loose_ends(self, kind: Kind) -> Iterator[ResolvedEdge]:
        """An edge without a producer for every input that no edge with ``kind`` leads to: its readers, those to be
        quantized, can run the transform themselves."""
        carried = {name for edge in self.resolved.edges if kind in edge.carries for name in edge.inputs}
        for shared in self.resolved.shared_inputs:
            readers = [path for path in shared.readers if path in self.formats]
            if readers and shared.name not in carried:
                ports = tuple(
                    Port(
                        path,
                        side="in",
                        has_bias=self.linear(path)._parameters.get("bias") is not None,
                        transposed=isinstance(self.linear(path), Conv1D),
                    )
                    for path in readers
                )
                width = self.weight_OI(readers[0]).shape[1]
                yield ResolvedEdge(
                    shared.name, width, frozenset({kind}), ports, None, False, judge=readers[0], inputs=(shared.name,)
                )

    def commit(self, edge: ResolvedEdge, transform: ChannelTransform, kind: Kind) -> None:
        """Folds ``transform`` into the block, in place. An edge without a producer applies it to the input at run time.

        Raises:
            ValueError: a transform under which the Fisher information that a later step needs is not known, or a side of
                the edge that is rotated at run time already.
        """
        self._check_not_rotated(edge)
        with torch.no_grad():
            add_bias(self.block, needs_bias(edge, kind))
            parameters = self.weights()
            self.fisher |= self._folded_fisher(edge, transform, parameters)
            packed = {f"{path}.weight" for path in self.formats}
            for name, value in fold(
                edge, transform, parameters
            ).items():  # what is not packed runs as it will be stored
                parameters[name].copy_(value if name in packed else value.to(self.store_dtype).to(value.dtype))
        if not edge.producers:
            for port in edge.consumers:
                self._run_on_input(port.module, transform)

    def rotate(self, path: str, of_input: Seeded, of_output: Seeded) -> None:
        """Rotates the weight of a linear on both sides, in place; the linear undoes it at run time.

        Raises:
            ValueError: a later step needs Fisher information, which is not known behind a rotation.
        """
        if path in self.fisher:
            raise ValueError(f"{self.full_name(path)}: {_NO_FISHER.format('rotation')}")
        linear = self.linear(path)
        w_OI, _ = of_input.fold_in(self.weight_OI(path).double(), None)
        w_OI, _ = of_output.fold_out(w_OI, None)
        with torch.no_grad():
            linear.get_parameter("weight").copy_(stored_as_OI(linear, w_OI))
        self._run_on_input(path, of_input)
        self.post[path] = (of_output.inverse(), *self.post.get(path, ()))

        def undo(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            return _before_bias(of_output.inverse(), module, y)

        linear.register_forward_hook(undo, prepend=True)  # what was rotated last is undone first

    def transform_inputs(self, paths: Iterable[str], transform: ChannelTransform) -> None:
        """Each named linear applies ``transform`` to its input at run time; its weight reads the result. The width of the
        weight may change.

        Raises:
            ValueError: a later step needs Fisher information, which does not follow.
        """
        for path in paths:
            if path in self.fisher:
                raise ValueError(f"{self.full_name(path)}: {_NO_FISHER.format(type(transform).__name__)}")
            assert path not in self.side and path not in self.nudge, f"{path}: a decision is for its input as it was"
            linear = self.linear(path)
            w_OI, _ = transform.fold_in(self.weight_OI(path), None)
            linear.weight = nn.Parameter(stored_as_OI(linear, w_OI).contiguous(), requires_grad=False)
            self._run_on_input(path, transform)

    def output(self, path: str, y: Tensor) -> Tensor:
        """What linear ``path``, not packed yet, makes of what its product and bias gave: ``post`` comes between the two."""
        for transform in self.post.get(path, ()):
            y = _before_bias(transform, self.linear(path), y)
        return y

    def _run_on_input(self, path: str, transform: ChannelTransform) -> None:
        self.pre[path] = (*self.pre.get(path, ()), transform)
        self.linear(path).register_forward_pre_hook(lambda _, args: (transform.forward(args[0]),))

    def _check_not_rotated(self, edge: ResolvedEdge) -> None:
        """A transform folded from here on would lie on the wrong side of those that a linear runs itself."""
        if edge.producers:
            for port in edge.ports:
                if port.module in (self.pre if port.side == "in" else self.post):
                    raise ValueError(
                        f"{self.full_name(port.module)} is transformed at run time already, so what is folded across the edge "
                        f"{edge.name!r} would be undone in the wrong order; put that step, or its method, first"
                    )

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
            raise ValueError(f"{self.full_name(edge.name)}: {_NO_FISHER.format(type(transform).__name__)}")
        for_gradients = Scale(1 / transform.s) if isinstance(transform, Scale) else transform
        roots = {f"{path}.weight": stored_as_OI(self.linear(path), self.fisher[path].sqrt()) for path in ports}
        folded = fold(edge, for_gradients, {**parameters, **roots})
        changed = {path: folded[f"{path}.weight"] for path in ports if f"{path}.weight" in folded}
        return {path: stored_as_OI(self.linear(path), root).square() for path, root in changed.items()}

    # Calibration

    def readers(self) -> dict[str, str]:
        """First reader to be quantized -> name, for every shared input that has one: the others may read it untransformed."""
        wanted = {}
        for shared in self.resolved.shared_inputs:
            for path in shared.readers:
                if path in self.formats:
                    wanted[path] = shared.name
                    break
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
        seen: dict[str, Tensor] = {}  # of one window, until the original stream has passed too

        def update(name: str, x: Tensor, paired: bool) -> None:
            for need in needs:
                if need.paired != paired:
                    continue
                counted = self._after_first(name, x, need.skip_first) if need.skip_first else x
                if counted.shape[-2]:
                    gathered[name][need] = need.update(gathered[name].get(need), counted)

        def gather(name: str, x_TI: Tensor) -> None:
            update(name, x_TI, paired=False)
            if any(need.paired for need in needs):
                seen[name] = x_TI.clone()

        def pair(name: str, x_TI: Tensor) -> None:
            mine = seen.get(name)
            if mine is not None and mine.shape == x_TI.shape:
                update(name, torch.stack([mine, x_TI]), paired=True)
                del seen[name]

        for i in range(len(self.io)):
            self._run(first, self.io.window(i), gather)
            if seen:
                with self._as_original():
                    self._run(first, self.io.window(i, original=True), pair)
                for name, mine in seen.items():
                    self.note(f"{name}: other tokens reach it in the original model, which it is not corrected for")
                    update(name, torch.stack([mine, mine]), paired=True)
                seen.clear()
            self.tick("calibrating")
            if all(need in found and need.enough(found[need]) for found in gathered.values() for need in needs):
                break
        return dict(gathered)

    def _after_first(self, name: str, x_TI: Tensor, skip: int) -> Tensor:
        """``x_TI`` of one window without its first positions. An input that is not reached by every token does not say which
        positions its rows have: it stays whole, and that is noted."""
        assert self.io is not None
        if len(x_TI) == self.io.x.shape[-2]:
            return x_TI[skip:]
        self.note(f"{name}: only some tokens reach it, so the first {skip} of a window are not told apart there")
        return x_TI

    def _run(self, first: Mapping[str, str], window: Tensor, gather: Callable[[str, Tensor], None]) -> None:
        """One window through the block: ``gather(name, x_TI)`` for each shared input that a token reaches, as it does."""

        def hook(name: str) -> Callable:
            def on_input(module: nn.Module, args: tuple) -> None:
                x_TI = args[0].detach().flatten(0, -2)
                if len(x_TI):
                    gather(name, x_TI)

            return on_input

        assert self.io is not None
        with ExitStack() as stack, torch.no_grad():
            for name, path in first.items():
                stack.callback(self.linear(path).register_forward_pre_hook(hook(name)).remove)
            self.io.call(self.block, window)

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """While open, packed linears are the ones that they replaced."""
        packed = {path: self.linear(path) for path in self.originals}
        try:
            for path, module in self.originals.items():
                set_module(self.block, path, module)
            yield
        finally:
            for path, module in packed.items():
                set_module(self.block, path, module)

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


_NO_FISHER = (
    "the Fisher information behind a {} does not follow from that before it; leave that step out, or choose a solver that "
    "needs no Fisher information"
)


def _before_bias(transform: ChannelTransform, linear: nn.Module, y: Tensor) -> Tensor:
    bias = linear._parameters.get("bias")
    return transform.forward(y) if bias is None else transform.forward(y - bias) + bias


def stored_as_OI(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``linear`` as ``[O, I]``: GPT-2's Conv1D stores the transpose. Its own inverse."""
    return weight.T if isinstance(linear, Conv1D) else weight


def set_module(block: nn.Module, path: str, module: nn.Module) -> None:
    """Puts ``module`` in the place ``path`` of ``block``."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent) if parent else block, name, module)
