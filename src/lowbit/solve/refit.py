"""Scales fitted anew to the codes that were chosen under them, and codes to the scales, in turn.

The loss ``(q - w) H (q - w)^T`` of a row is quadratic in its scales (and minima) while its codes stand: with v the parameters of all
its bands and ``q = A v`` its matrix is ``N = A^T H A``. So the best parameters follow in closed form, those of all bands together. They are then rounded to storage. Where parameters are small
integers times a second-level number (the K types of llama.cpp), both levels are searched: the second in closed form while the
integers stand, the integers one after another while the second stands.

Law: no row's loss rises, measured with what is stored.

Shapes: O row, I column in the order of visits, B band, F floating field of the grid, P = F * B parameters of a row, S second-level
granule of a row, Q = F * S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics import Affine, Block, MinMax, Offset, Params, PerChannel, PerGroup, QTensor, Spec, quantize
from lowbit.numerics.grids.base import Field
from lowbit.solve.columns import Placed

_SWEEPS = 4
_RIDGE = 1e-6  # share of the mean diagonal, for bands whose codes are all zero
_ENTRIES = 2**22  # of the matrices of rows that are solved together
REFIT_BYTES = 4 * 4 * _ENTRIES
"""Of these matrices, with copies."""


def why_no_refit(spec: Spec) -> str | None:
    """The reason why the parameters of ``spec`` cannot be fitted anew; None if they can."""
    if spec.grid.kind not in (Affine, Offset):
        return f"{spec.grid} is not scaled by one number"
    if not isinstance(spec.granularity, PerGroup | PerChannel):
        return f"{spec.granularity} shares scales among rows"
    stats = spec.stats
    if stats is None:
        return None
    if spec.stats_centred or stats.stats is not None or stats.grid.kind is not Affine:
        return "their scales are centred, quantized twice, or not scaled by one number"
    inside = isinstance(stats.granularity, Block) and stats.granularity.cols == 1
    alone = len(stats.grid.fields) == 1
    return None if inside and alone else f"{stats} of the scales spans rows, or has a zero point"


def refit(codes_IO: Tensor, W: Tensor, H: Tensor, band_I: Tensor, placed: Placed, spec: Spec) -> Placed:
    """Parameters of lower loss for the same codes.

    Args:
        codes_IO: uint8 ``[I, O]``.
        W: the target ``[I, O]``.
        H: ``[I, I]``, damped.
        band_I: the band of each column.
        placed: the parameters so far.
        spec: a format without a reason in :func:`why_no_refit`.
    """
    names = [field.name for field in _floating(spec)]
    rows, bands = codes_IO.shape[1], int(band_I.max()) + 1
    found = []
    for some in torch.arange(rows).split(max(1, _ENTRIES // (len(names) * bands) ** 2)):
        here = spec.grid.kind(*(None if p is None else p.view(rows, bands)[some] for p in placed.params))
        problem = _Problem.of(codes_IO[:, some], W[:, some], H, band_I, here, spec, names)
        if spec.stats is None:
            found.append((_rounded_solution(problem, spec),))
        else:
            levels = [_Level.of(placed.second[name], some) for name in names]
            found.append(_two_levels(problem, levels, spec.stats))
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return _placed(joined, placed.params, spec)


def _floating(spec: Spec) -> list[Field]:
    return [field for field in spec.grid.fields if field.bits is None]


def _placed(found: list[Tensor], params: Params, spec: Spec) -> Placed:
    """``found`` ``[O, F * ...]`` as parameters: their values, or codes and scales of the second level; ``params`` has the others."""
    fields = _floating(spec)
    if spec.stats is None:
        values = {f.name: x.reshape(-1, 1) for f, x in zip(fields, found[0].chunk(len(fields), 1), strict=True)}
        return Placed(params._replace(**values), {})
    second, values = {}, {}
    for field, codes, scale in zip(fields, *(x.chunk(len(fields), 1) for x in found), strict=True):
        stored = QTensor(codes.T.contiguous(), Affine(scale.T.reshape(-1, 1)), spec.stats)
        second[field.name] = stored
        values[field.name] = spec.from_second(stored, field).to(scale.dtype)
    return Placed(params._replace(**values), second)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The loss of some rows against that of parameters so far: ``d^T N d - 2 d^T g`` with ``d = v - origin``.

    Args:
        N: ``[O, P, P]``.
        g: ``A^T H (w - A origin)``, ``[O, P]``.
        origin: ``[O, P]``.
    """

    N: Tensor
    g: Tensor
    origin: Tensor

    @staticmethod
    def of(
        codes_IO: Tensor, W: Tensor, H: Tensor, band_I: Tensor, params: Params, spec: Spec, names: list[str]
    ) -> _Problem:
        """The problem of the rows of ``codes_IO``; ``params``: ``[O, B]`` each."""
        held = params._asdict()
        rows, bands = held[names[0]].shape
        by_column = {n: None if p is None else p.T[band_I].reshape(-1, 1) for n, p in held.items()}
        shape = codes_IO.shape
        restored = spec.grid.decode(codes_IO.reshape(-1, 1), spec.grid.kind(**by_column)).view(shape)
        basis = [_basis(codes_IO, by_column, spec, name, names).to(W.dtype) for name in names]
        left = H @ (W - restored)
        N = W.new_empty(rows, len(names), bands, len(names), bands)
        g = W.new_empty(rows, len(names), bands)

        def by_band(x_IO: Tensor) -> Tensor:
            return W.new_zeros(bands, rows).index_add_(0, band_I, x_IO).T

        for j, a_IO in enumerate(basis):
            g[:, j] = by_band(a_IO * left)
            for b in range(bands):
                at = (band_I == b).nonzero()[:, 0]
                seen = H[:, at] @ a_IO[at]
                for i, other in enumerate(basis):
                    N[:, i, :, j, b] = by_band(other * seen)
        return _Problem(N.flatten(3).flatten(1, 2), g.flatten(1), torch.cat([held[name] for name in names], 1))

    def loss(self, v_OP: Tensor) -> Tensor:
        """``[O, 1]``."""
        d = v_OP - self.origin
        return ((_times(self.N, d) - 2 * self.g) * d).sum(1, keepdim=True)

    def gradient(self, v_OP: Tensor) -> Tensor:
        """Half of the falling gradient at ``v_OP``."""
        return self.g - _times(self.N, v_OP - self.origin)

    def best(self) -> Tensor:
        """The best parameters, near the origin where several are."""
        diagonal = self.N.diagonal(dim1=1, dim2=2).clamp(min=0)
        lift = _RIDGE * (diagonal + diagonal.mean(1, keepdim=True)) + torch.finfo(self.N.dtype).tiny
        return self.origin + torch.linalg.solve(self.N + torch.diag_embed(lift), self.g)

    def through(self, M_OPQ: Tensor, u_OQ: Tensor) -> _Problem:
        """The problem of u with ``v = M u``, against ``M u_OQ``."""
        g = self.gradient(_times(M_OPQ, u_OQ))
        return _Problem(M_OPQ.mT @ self.N @ M_OPQ, _times(M_OPQ.mT, g), u_OQ)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _basis(codes_IO: Tensor, params: dict[str, Tensor | None], spec: Spec, name: str, names: list[str]) -> Tensor:
    """What one unit of the field ``name`` adds to each value, ``[I, O]``."""
    ones = {each: torch.full_like(params[name], float(each == name)) for each in names}  # pyright: ignore[reportArgumentType]
    unit = spec.grid.kind(**{**params, **ones})
    return spec.grid.decode(codes_IO.reshape(-1, 1), unit).view(codes_IO.shape)


def _rounded_solution(problem: _Problem, spec: Spec) -> Tensor:
    """The best parameters as they are stored, ``[O, P]``, in rows where they are better than those so far."""
    fields, so_far = _floating(spec), problem.origin
    best = problem.best().to(spec.torch_scale_dtype).to(so_far.dtype).chunk(len(fields), 1)
    best = torch.cat([spec.lifted(x, field) for x, field in zip(best, fields, strict=True)], 1)
    free = torch.tensor([field.signed or not field.floored for field in fields], device=best.device)
    free = free.repeat_interleave(best.shape[1] // len(fields))
    usable = (torch.isfinite(best) & ((best > 0) | free)).all(1, keepdim=True)
    return torch.where(usable & (problem.loss(best.where(usable, so_far)) < 0), best, so_far)


@dataclass(frozen=True, eq=False)
class _Level:
    """The second level of one field in some rows.

    Args:
        codes_OB: uint8.
        scale_OS: numbers that storage holds.
    """

    codes_OB: Tensor
    scale_OS: Tensor

    @staticmethod
    def of(q: QTensor, rows: Tensor) -> _Level:
        assert isinstance(q.params, Affine)
        scale = q.params.scale.view(-1, q.codes.shape[1])
        return _Level(q.codes.T[rows], scale.T[rows])


def _two_levels(problem: _Problem, before: list[_Level], stats: Spec) -> tuple[Tensor, Tensor]:
    """Codes ``[O, P]`` and scales ``[O, Q]`` of the second level: the best of what is found from those so far, and from the best
    parameters rounded to nearest."""
    fresh = [_Level.of(_nearest(x, stats), torch.arange(len(x))) for x in problem.best().chunk(len(before), 1)]
    kept = _joined(before)
    granule_P = _granules(stats, kept[0].shape[1], len(before)).to(kept[0].device)
    kept_loss = problem.loss(_values(*kept, granule_P, stats))
    for start in (kept, _joined(fresh)):
        found = _descend(problem, *start, granule_P, stats)
        loss = problem.loss(_values(*found, granule_P, stats))
        better = loss < kept_loss
        kept = torch.where(better, found[0], kept[0]), torch.where(better, found[1], kept[1])
        kept_loss = torch.where(better, loss, kept_loss)
    return kept


def _joined(levels: list[_Level]) -> tuple[Tensor, Tensor]:
    """Codes and scales of all fields, side by side."""
    return torch.cat([level.codes_OB for level in levels], 1), torch.cat([level.scale_OS for level in levels], 1)


def _nearest(x_OB: Tensor, stats: Spec) -> QTensor:
    return quantize(x_OB.T.contiguous(), stats, MinMax())


def _granules(stats: Spec, parameters: int, fields: int) -> Tensor:
    """The second-level granule of each parameter, ``[P]``; those of the fields one after another."""
    assert isinstance(stats.granularity, Block)
    bands, size = parameters // fields, stats.granularity.rows
    wide = -(-bands // size)
    return torch.cat([torch.arange(bands) // size + i * wide for i in range(fields)])


def _values(codes_OP: Tensor, scale_OQ: Tensor, granule_P: Tensor, stats: Spec) -> Tensor:
    scale = scale_OQ[:, granule_P]
    return stats.grid.decode(codes_OP.reshape(-1, 1), Affine(scale.reshape(-1, 1))).view(codes_OP.shape)


def _descend(
    problem: _Problem, codes_OP: Tensor, scale_OQ: Tensor, granule_P: Tensor, stats: Spec
) -> tuple[Tensor, Tensor]:
    """Alternates between the scales in closed form and each code in turn."""
    codes, scale = codes_OP.clone(), scale_OQ.clone()
    diagonal = problem.N.diagonal(dim1=1, dim2=2)
    for _ in range(_SWEEPS):
        unit = _values(codes, torch.ones_like(scale), granule_P, stats)
        M = unit.new_zeros(*unit.shape, scale.shape[1]).scatter_(
            2, granule_P.expand(len(unit), -1)[:, :, None], unit[:, :, None]
        )
        outer = problem.through(M, scale)
        best = outer.best().to(stats.torch_scale_dtype).to(scale.dtype)
        usable = (torch.isfinite(best) & (best * scale >= 0)).all(1, keepdim=True)  # signs stay
        usable &= outer.loss(best.where(usable, scale)) < 0
        scale = torch.where(usable, best, scale)
        v = _values(codes, scale, granule_P, stats)
        g, before = problem.gradient(v), codes.clone()
        for p, granule in enumerate(granule_P.tolist()):
            placed = Affine(scale[:, granule, None])
            wish = v[:, p, None] + g[:, p, None] / diagonal[:, p, None].clamp(min=1e-30)
            code = stats.grid.encode(wish, placed)
            step = stats.grid.decode(code, placed) - v[:, p, None]
            codes[:, p] = code[:, 0]
            v[:, p] += step[:, 0]
            g -= step * problem.N[:, :, p]
        if torch.equal(codes, before):
            break
    return codes, scale
