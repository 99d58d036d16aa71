"""The state of one block while steps run: the block, and the decisions of earlier steps.

Steps know no shards, files or other blocks. They see a block in float32 whose linears are drafts
(:class:`~lowbit.modules.DraftLinear`), with all transforms so far folded in. They run windows of calibration tokens
through it and leave their decisions in the drafts: weights, formats and ranges. At last packed linears replace the
drafts. The walk owns everything else, so the same steps serve a streamed model and a single linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.architectures import Kind, Port, ResolvedBlock, ResolvedEdge, add_bias, fold, needs_bias
from lowbit.caches import PackedLayer
from lowbit.modules import DraftLinear, LinearFormat, QuantLinear, make_drafts
from lowbit.modules.draft_linear import for_gradients, no_fisher
from lowbit.numerics import Fisher, SquareSum, Statistic, narrowed
from lowbit.solve import Solution
from lowbit.steps.block_io import BlockIO
from lowbit.steps.collection import Collection
from lowbit.transforms import ChannelTransform, Permute, Rotate, Scale

Stats = Mapping[Statistic, Tensor]


def product_dtype(state: BlockState) -> torch.dtype:
    """The type of products in passes that gather statistics, and in searches."""
    assert state.io is not None
    device = state.io.x.device.type
    with state.io.products():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


@dataclass
class LayerRecord:
    """The report's entry for one linear.

    Attributes:
        name: path in the model.
        role: the architecture's role of the linear.
        weights: number of weights.
        error: relative squared output error on calibration tokens, or None.
        zeroed: share of the granules that were not zero before and are all zero now.
    """

    name: str
    role: str
    bits_per_weight: float
    weights: int
    error: float | None = None
    zeroed: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockContext:
    """Facts about a block that no step changes.

    Attributes:
        name: path of the block in the model; empty for a single linear.
        resolved: the architecture's table on this block.
        io: calibration windows; None for data-free recipes.
        seed: the source of all random choices in this block.
        store_dtype: dtype in which unquantized parameters (norm gains) will be saved. Folded values are rounded to it,
            so later steps see the values of the saved model.
        dtypes: dtypes of the parameters that are saved in another one, by name in the block.
        tick: called with the current activity as work goes on.
        rotated: whether the block reads and writes a rotated residual stream, as in ``io``.
        reads_inputs: whether the recipe learns anything from ``io``. Otherwise it is there for the report.
        caches: empty layers of the cache, in the recipe's formats, by path of the attention module that has them; none where
            its keys and values stay as they are.
        keeps_latents: whether a later stage needs the weights that are rounded here.
        given: squares of the inputs of linears that were gathered elsewhere, by path; they count instead of those of ``io``.
        rotations: those that a stage before has learned, by name of the edge across which they are folded.
        solved: solutions of linears that were found elsewhere, by path: they are not searched again.
        keeps_solutions: whether solutions are kept in ``BlockState.solutions``.
    """

    name: str
    resolved: ResolvedBlock
    io: BlockIO | None = None
    seed: int = 0
    store_dtype: torch.dtype = torch.float32
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    tick: Callable[[str], None] = lambda what: None
    rotated: bool = False
    reads_inputs: bool = True
    caches: Mapping[str, PackedLayer] = field(default_factory=dict)
    keeps_latents: bool = False
    given: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Rotate] = field(default_factory=dict)
    solved: Mapping[str, Solution] = field(default_factory=dict)
    keeps_solutions: bool = False


@dataclass
class BlockState:
    """The state of one block. Made by :meth:`of`.

    Attributes:
        block: its linears are drafts, or packed.
        originals: drafts that packed linears replaced, kept where paired statistics are still to be gathered.
        records: the report's entries of packed linears.
        latents: what the codes of packed linears were rounded from, by path, where a later stage needs it.
        notes: warnings for the report.
        solutions: those of packed linears, by path, where the context asks for them.
    """

    context: BlockContext
    block: nn.Module
    originals: dict[str, DraftLinear] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    latents: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    solutions: dict[str, Solution] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        block: nn.Module,
        resolved: ResolvedBlock,
        formats: Mapping[str, LinearFormat],
        io: BlockIO | None = None,
        fisher: Mapping[str, Tensor] | None = None,
        **context: Any,
    ) -> BlockState:
        """The state before the first step. Linears of ``block`` become drafts where they are not yet.

        Args:
            formats: formats of the linears to quantize, by path.
            fisher: Fisher information of their weights ``[O, I]``, by path.
            context: further fields of :class:`BlockContext`.
        """
        make_drafts(block, resolved.linears)
        state = cls(BlockContext(name, resolved, io, **context), block)
        for path, form in formats.items():
            state.draft(path).format = form
        for path, f_OI in (fisher or {}).items():
            state.draft(path).fisher = f_OI
        return state

    @property
    def name(self) -> str:
        return self.context.name

    @property
    def resolved(self) -> ResolvedBlock:
        return self.context.resolved

    @property
    def io(self) -> BlockIO | None:
        return self.context.io

    @property
    def seed(self) -> int:
        return self.context.seed

    def store_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the parameter ``name`` of the block will be saved, unless it is packed."""
        return self.context.dtypes.get(name, self.context.store_dtype)

    def tick(self, what: str) -> None:
        self.context.tick(what)

    def full_name(self, path: str) -> str:
        """The name of the linear at ``path`` in the model."""
        return f"{self.name}.{path}" if self.name else path

    def note(self, text: str, at: str = "") -> None:
        """Adds a warning to the report, once for each place.

        Args:
            text: names no place, so that the report can join equal warnings.
            at: what is concerned, such as the path of a linear or the name of an edge; the block if empty.
        """
        where = self.full_name(at) if at else self.name
        note = f"{where}: {text}" if where else text
        if note not in self.notes:
            self.notes.append(note)

    # Linears

    def draft(self, path: str) -> DraftLinear:
        """The linear at ``path``, which must not be packed yet."""
        draft = self.block.get_submodule(path)
        assert isinstance(draft, DraftLinear), f"{path} is a {type(draft).__name__}"
        return draft

    @property
    def drafts(self) -> dict[str, DraftLinear]:
        """The linears to be quantized that are not packed yet, by path."""
        linears = {path: self.block.get_submodule(path) for path in self.resolved.linears}
        return {p: each for p, each in linears.items() if isinstance(each, DraftLinear) and each.format is not None}

    @property
    def formats(self) -> dict[str, LinearFormat]:
        """Formats of the linears that are to be quantized or are packed, by path."""
        linears = {path: self.block.get_submodule(path) for path in self.resolved.linears}
        held = {path: each.format for path, each in linears.items() if isinstance(each, DraftLinear | QuantLinear)}
        return {path: form for path, form in held.items() if form is not None}

    # Edges

    def edges(self, at: Iterable[str], kind: Kind, *, note: bool = True) -> Iterator[ResolvedEdge]:
        """Edges that carry ``kind`` and whose name matches a pattern in ``at``.

        Other matches, and patterns without a match, are noted unless ``note`` is False.
        """
        for pattern in at:
            matching = [edge for edge in self.resolved.edges if fnmatch(edge.name, pattern)]
            if not matching and note:
                self.note(f"no edge {pattern!r} in this architecture: its {kind.value} is not applied")
            for edge in matching:
                if kind in edge.carries:
                    yield edge
                elif note:
                    self.note(f"edge {edge.name!r} cannot carry a {kind.value} here: not applied")

    def loose_ends(self, kind: Kind) -> Iterator[ResolvedEdge]:
        """An edge without a producer for every input that no edge with ``kind`` covers.

        Its consumers are the readers of the input that are to be quantized; they can run the transform themselves.
        """
        carried = {name for edge in self.resolved.edges if kind in edge.carries for name in edge.inputs}
        drafts = self.drafts
        for shared in self.resolved.shared_inputs:
            readers = [path for path in shared.readers if path in drafts]
            if readers and shared.name not in carried:
                ports = tuple(Port(path, side="in", has_bias=drafts[path].bias is not None) for path in readers)
                width = drafts[readers[0]].weight.shape[1]
                yield ResolvedEdge(
                    shared.name, width, frozenset({kind}), ports, None, False, judge=readers[0], inputs=(shared.name,)
                )

    def commit(self, edge: ResolvedEdge, transform: ChannelTransform, kind: Kind) -> None:
        """Folds ``transform`` into the block, in place, or lets the consumers run it if the edge has no producer.

        Raises:
            ValueError: a later step needs Fisher information, which does not follow this transform; or a linear already
                runs a transform of its own on a side of the edge.
        """
        if not edge.producers:
            for port in edge.consumers:
                self.transform(port.module, transform)
            return
        self._check_not_rotated(edge)
        with torch.no_grad():
            add_bias(self.block, needs_bias(edge, kind))
            parameters = dict(self.block.named_parameters())
            self._fold_fisher(edge, transform, parameters)
            self.write(fold(edge, transform, parameters))

    def transform(self, path: str, of_input: ChannelTransform, of_output: ChannelTransform | None = None) -> None:
        """Lets linear ``path`` run ``of_input`` on its input and undo ``of_output`` on its output.

        See :meth:`DraftLinear.transform`.

        Raises:
            ValueError: a later step needs Fisher information, which does not follow these transforms.
        """
        draft = self.draft(path)
        try:
            draft.transform(of_input, of_output)
        except ValueError as error:
            raise ValueError(f"{self.full_name(path)}: {error}") from error
        if draft.bias is not None:
            self.write({f"{path}.bias": draft.bias})

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Gives the block's parameters new values, by name, in place.

        Parameters that will not be packed are rounded as they will be stored.
        """
        packed = {f"{path}.weight" for path in self.drafts}
        for name, value in values.items():
            parameter = self.block.get_parameter(name)
            parameter.copy_(
                value
                if name in packed
                else narrowed(self.full_name(name), value, self.store_dtype(name)).to(value.dtype)
            )

    def _check_not_rotated(self, edge: ResolvedEdge) -> None:
        """Refuses an edge where a linear already runs transforms of its own: a fold would lie on their wrong side."""
        for port in edge.ports:
            linear = self.block.get_submodule(port.module)
            if isinstance(linear, DraftLinear) and (linear.pre if port.side == "in" else linear.post):
                raise ValueError(
                    f"{self.full_name(port.module)} is transformed at run time already, so what is folded across the edge "
                    f"{edge.name!r} would be undone in the wrong order; put that step, or its method, first"
                )

    def _fold_fisher(self, edge: ResolvedEdge, transform: ChannelTransform, parameters: Mapping[str, Tensor]) -> None:
        """Changes the Fisher information of drafts as the fold of ``transform`` does: see ``fisher_behind``."""
        drafts = self.drafts
        known = {p.module: f for p in edge.ports if p.module in drafts and (f := drafts[p.module].fisher) is not None}
        if not known:
            return
        if not isinstance(transform, Scale | Permute):
            raise ValueError(f"{self.full_name(edge.name)}: {no_fisher(transform)}")
        roots = {f"{path}.weight": f_OI.sqrt() for path, f_OI in known.items()}
        folded = fold(edge, for_gradients(transform), {**parameters, **roots})
        for path in known:
            if f"{path}.weight" in folded:
                drafts[path].fisher = folded[f"{path}.weight"].square()

    # Calibration

    def readers(self) -> dict[str, str]:
        """First reader to be quantized -> name, for each shared input that has one.

        Other readers may read the input untransformed.
        """
        wanted, drafts = {}, self.drafts
        for shared in self.resolved.shared_inputs:
            for path in shared.readers:
                if path in drafts:
                    wanted[path] = shared.name
                    break
        return wanted

    def collect(
        self,
        needs: Iterable[Statistic],
        inputs: Iterable[str] | None = None,
        behind: Tensor | None = None,
        around: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> dict[str, Stats]:
        """Gathers statistics of shared inputs in one forward over the calibration windows.

        Needs that are not of inputs are skipped; :meth:`stats_of` adds them.

        Args:
            needs: the statistics to gather.
            inputs: names of shared inputs; None: all.
            behind: ``[N, T, d]``, filled with the block's output; None: what only the output needs is not computed.
            around: makes a context for the pass of a window, by its number; every window then passes through the whole block.

        Returns:
            Statistics by name of the input. The mapping is empty for an input that saw no token (an expert that was
                never chosen).

        Raises:
            ValueError: there is no calibration data.
        """
        needs = tuple(need for need in needs if need.of_input)
        wanted = {name: path for path, name in self.readers().items() if inputs is None or name in inputs}
        if not needs:
            return {name: {} for name in wanted}
        if self.io is None:
            raise ValueError(f"{self.full_name('')}: this recipe needs calibration text ({needs[0]}); none was given")
        return dict(Collection(self, needs, wanted, behind, around).run())

    def stats_of(self, stats: Mapping[str, Stats], path: str) -> Stats:
        """All statistics for linear ``path``: those of its input, from :meth:`collect`, and those of its weight."""
        linear = self.block.get_submodule(path)
        fisher = linear.fisher if isinstance(linear, DraftLinear) else None
        own: dict[Statistic, Tensor] = {} if fisher is None else {Fisher(): fisher}
        if path in self.context.given:
            own[SquareSum()] = self.context.given[path]
        for shared in self.resolved.shared_inputs:
            if path in shared.readers:
                return {**stats.get(shared.name, {}), **own}
        raise AssertionError(f"{path} reads no shared input")

    def edge_stat(self, edge: ResolvedEdge, stats: Mapping[str, Stats], need: Statistic) -> Tensor | None:
        """One statistic of the activation at ``edge``, joined over several experts, or None without tokens."""
        joined: Tensor | None = None
        for name in edge.inputs:
            new = stats.get(name, {}).get(need)
            if new is not None:
                joined = new if joined is None else need.join(joined.clone(), new)
        return joined
