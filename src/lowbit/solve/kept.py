"""Weights that the column solver keeps in float16: the choice so far, and the values to store.

Shapes: O output channel, I input channel in the order of visits; K column of one band.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics import Grid, Params, SideTerm
from lowbit.solve.columns import Bands
from lowbit.solve.outliers import Chosen, OutlierRule, Watch, side_terms


@dataclass(eq=False)
class Kept:
    """Kept weights and whole kept columns.

    Args:
        mask: bool ``[I, O]``, True where a weight is kept.
        value: ``[I, O]``, added to the decoded code there, rounded to float16.
        rounded: number of rounded columns; all later ones are kept whole.
        u_I: diagonal of U, which scales errors.
        watch: the part of a live rule in the column loop.
    """

    mask: Tensor
    value: Tensor
    rounded: int
    u_I: Tensor
    watch: Watch | None

    @staticmethod
    def of(w_IO: Tensor, chosen: Chosen, take: Tensor, rules: tuple[OutlierRule, ...], u_I: Tensor) -> Kept | None:
        """The state before the first column of ``w_IO``; None if no rule keeps anything.

        Args:
            w_IO: the weight in the order of visits.
            chosen: choices made before rounding.
            take: original numbers of the columns, in the order of visits.
            rules: all outlier rules.
            u_I: diagonal of U.
        """
        watch = next((rule.watch(w_IO.T, u_I) for rule in rules if rule.live), None)
        out_OI = chosen.out_of_fits(w_IO.T)
        if watch is None and out_OI is None:
            return None
        mask = torch.zeros_like(w_IO, dtype=torch.bool) if out_OI is None else out_OI[:, take].T.contiguous()
        return Kept(mask, torch.zeros_like(w_IO), len(w_IO) - len(chosen.columns), u_I, watch)

    def hidden(self, here: slice, w_IO: Tensor, grid: Grid, bands: Bands, b: int, columns: Tensor) -> Tensor | None:
        """Weights of band b, visited ``here`` and stored at ``columns``, that its fit must ignore; bool ``[O, K]``."""
        out = self.mask[here].T if self.mask[here].any() else None
        if self.watch is None:
            return out
        w_OK = w_IO[here].T.contiguous()

        def place(some_FN: Tensor) -> Iterator[tuple[Tensor, Params]]:
            return bands.trials(b, w_OK, columns, some_FN, out)

        unfit = self.watch.unfit(w_OK, self.u_I[here], grid, place)
        return out if unfit is None else unfit if out is None else unfit | out

    def at(
        self, i: int, w_O1: Tensor, codes_O1: Tensor, q_O1: Tensor, grid: Grid, params: Params
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of the i-th visited column, with its kept weights taken out of the rounding."""
        kept_O1 = self.mask[i, :, None]
        if self.watch is not None:
            kept_O1 = kept_O1 | (((w_O1 - q_O1) / self.u_I[i]).square() > self.watch.tau)
        zero = grid.encode(torch.zeros_like(w_O1), params)
        base = grid.decode(zero, params)
        # Rounded to float16 first, so that the error fed back is that of the stored value.
        value = torch.where(kept_O1, (w_O1 - base).half().to(w_O1.dtype), 0.0)
        self.mask[i], self.value[i] = kept_O1[:, 0], value[:, 0]
        return torch.where(kept_O1, zero, codes_O1), torch.where(kept_O1, base + value, q_O1)

    def side_terms(self, stored_at: Tensor) -> tuple[SideTerm, ...]:
        """The terms to store; ``stored_at``: the stored place of each column."""
        back, n = stored_at.argsort(), self.rounded
        mask = self.mask.clone()
        mask[n:] = False
        return side_terms(stored_at[n:], self.value[n:].T, mask[back].T, self.value[back].T)
