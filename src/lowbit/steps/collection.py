"""One pass over the calibration windows that gathers statistics of a block's inputs.

Windows run side by side (:mod:`lowbit.parallel`). Each statistic takes them in their order, so that its bits do not depend
on the number of threads.

Shapes: N window, T token, I input channel, d channel of the residual stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.modules import DraftLinear
from lowbit.numerics import Statistic
from lowbit.parallel import TakenTwice, Turns, each
from lowbit.steps.precision import rounded_factors
from lowbit.surroundings import return_free_memory

if TYPE_CHECKING:
    from lowbit.steps.state import BlockState


class Collection:
    """See :meth:`lowbit.steps.state.BlockState.collect`.

    Args:
        state: of the block; it has calibration windows.
        needs: statistics of inputs.
        readers: the linear at which each shared input is seen, by the input's name.
        behind, around: as for ``collect``.
    """

    def __init__(
        self,
        state: BlockState,
        needs: Sequence[Statistic],
        readers: Mapping[str, str],
        behind: Tensor | None,
        around: Callable[[int], AbstractContextManager[None]] | None = None,
    ):
        assert state.io is not None
        self.around = around
        self.state, self.io, self.needs, self.readers, self.behind = state, state.io, needs, readers, behind
        self.paired = any(need.paired for need in needs)
        self.gathered: dict[str, dict[Statistic, Tensor]] = {}
        self._partial: dict[
            str, int
        ] = {}  # inputs that only some tokens reach, and positions that they should leave out
        self._window = threading.local()

    def run(self) -> dict[str, dict[Statistic, Tensor]]:
        """The statistics by name of the input."""
        self.gathered = {name: {} for name in self.readers}
        with torch.no_grad(), rounded_factors(self._narrow):
            if self.paired or torch.get_num_threads() == 1:
                self._in_turn()
            else:
                try:
                    self._side_by_side()
                except TakenTwice:  # a linear that runs several times in a window; only one thread keeps that in order
                    self.gathered = {name: {} for name in self.readers}
                    self._in_turn()
        return_free_memory()  # what windows took, on each thread
        for name in self.readers:
            if name in self._partial:
                self.state.note(
                    f"only some tokens reach it, so the first {self._partial[name]} of a window are unknown there",
                    at=name,
                )
        return {name: {need: need.complete(acc) for need, acc in of.items()} for name, of in self.gathered.items()}

    @property
    def _narrow(self) -> bool:
        """Whether the pass multiplies in a type narrower than float32; a Gram matrix is then that of the factors it reads."""
        with self._products():
            return torch.is_autocast_enabled(self.io.x.device.type)

    def _products(self) -> AbstractContextManager[Any]:
        # Differences of two passes drown in the rounding of narrow products.
        return nullcontext() if self.paired else self.io.products()

    def _enough(self) -> bool:
        """Whether further windows would change nothing."""
        if self.behind is not None or self.around is not None:
            return False
        return all(
            need in known and need.enough(known[need]) for known in self.gathered.values() for need in self.needs
        )

    def _side_by_side(self) -> None:
        turns = Turns(self.readers)

        def gather(name: str, x_TI: Tensor) -> None:
            with turns.at(name, self._window.number):
                self._update(name, x_TI, paired=False)

        def window(i: int) -> None:
            self._window.number = i
            try:
                if not self._enough():
                    self._forward(i)
                turns.leave(i)
            except BaseException as error:
                turns.fail(error)
                raise

        with self._observed(gather):
            each(len(self.io), window, lambda: self.state.tick("calibrating"))

    def _in_turn(self) -> None:
        seen: dict[str, Tensor] = {}  # of one window, until the original stream has passed

        def gather(name: str, x_TI: Tensor) -> None:
            self._update(name, x_TI, paired=False)
            if self.paired:
                seen[name] = x_TI.clone()

        def pair(name: str, x_TI: Tensor) -> None:
            own = seen.get(name)
            if own is not None and own.shape == x_TI.shape:
                self._update(name, torch.stack([own, x_TI]), paired=True)
                del seen[name]

        for i in range(len(self.io)):
            with self._observed(gather):
                self._forward(i)
            if seen:
                with self._as_original(), self._observed(pair):
                    self._forward(i, original=True)
                for name, own in seen.items():
                    self.state.note(
                        "other tokens reach it in the original model; it is not corrected for that", at=name
                    )
                    self._update(name, torch.stack([own, own]), paired=True)
                seen.clear()
            self.state.tick("calibrating")
            if self._enough():
                break

    def _forward(self, i: int, original: bool = False) -> None:
        window = self.io.window(i, original=True) if original else self.io.window(i)
        around = nullcontext() if self.around is None or original else self.around(i)
        with self._products(), around:
            y = self.io.run(self.state.block, window, i)
        if self.behind is not None and not original:
            self.behind[i] = y[0]

    def _update(self, name: str, x_TI: Tensor, paired: bool) -> None:
        gathered = self.gathered[name]
        for need in self.needs:
            if need.paired == paired:
                counted = self._after_first(name, x_TI, need.skip_first) if need.skip_first else x_TI
                if counted.shape[-2]:
                    gathered[need] = need.update(gathered.get(need), counted)

    def _after_first(self, name: str, x_TI: Tensor, skip: int) -> Tensor:
        """``x_TI`` of one window without its first ``skip`` positions.

        If only some tokens reach an input, the positions of its rows are unknown: it stays whole, and that is noted.
        """
        if len(x_TI) == self.io.x.shape[-2]:
            return x_TI[skip:]
        self._partial[name] = max(skip, self._partial.get(name, 0))
        return x_TI

    @contextmanager
    def _observed(self, gather: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While open, every forward calls ``gather(name, x_TI)`` for each shared input that tokens reach."""

        def observer(name: str) -> Callable[[Tensor], None]:
            def on_input(x: Tensor) -> None:
                x_TI = x.detach().flatten(0, -2)
                if len(x_TI):
                    gather(name, x_TI.to(torch.promote_types(x.dtype, torch.float32)))

            return on_input

        with ExitStack() as stack:
            for name, path in self.readers.items():
                stack.enter_context(self.state.draft(path).observed(observer(name)))
            for path in self._needless():
                linear = self.state.block.get_submodule(path)
                if isinstance(linear, DraftLinear):
                    stack.enter_context(linear.idle())
            yield

    def _needless(self) -> list[str]:
        """Linears whose output no wanted input depends on: those of the last stage that is read, and of later ones."""
        if self.behind is not None or self.around is not None:
            return []
        stages, read = self.state.resolved.stages, set(self.readers.values())
        last = max((i for i, stage in enumerate(stages) if read & set(stage)), default=len(stages))
        return [path for stage in stages[last:] for path in stage]

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """While open, the drafts in ``originals`` stand in place of their packed linears."""
        block, originals = self.state.block, self.state.originals
        packed = {path: block.get_submodule(path) for path in originals}
        try:
            for path, draft in originals.items():
                block.set_submodule(path, draft)
            yield
        finally:
            for path, module in packed.items():
                block.set_submodule(path, module)
