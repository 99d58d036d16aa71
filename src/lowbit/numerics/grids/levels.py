"""Grids that are a list of levels: floating formats (ExMy) and tables (NF4).

Both scale the granule so that its largest magnitude meets the largest level, then take the nearest level. They differ in
the source of the levels and in the meaning of a code (a bit pattern; an index). Midpoints between neighbouring levels
decide which is nearest; a value on a midpoint goes to the lower level of a table, and to the even code of a floating
format, as processors round.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowbit.numerics.grids.base import OF_NOTHING, Affine, Field
from lowbit.numerics.serialize import serializable

_FEW = 32  # midpoints that are compared one by one, which is much faster on a CPU than a search for each value

_LARGEST = torch.finfo(torch.float32).max


def _rank(v: Tensor, midpoints: Tensor) -> Tensor:
    """Number of the rising ``midpoints`` below each value of ``v``, int32, in the shape of ``v``."""
    wide = torch.promote_types(v.dtype, torch.float32)  # exact, and numpy has no bfloat16
    v, midpoints = v.to(wide).contiguous(), midpoints.to(wide)
    if len(midpoints) > _FEW or v.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.bucketize(v, midpoints, out_int32=True)
    from lowbit.numerics.loops import count_below  # numba is slow to import

    count = torch.zeros(v.shape, dtype=torch.int32)
    count_below(v.detach().view(-1).numpy(), midpoints.numpy(), count.view(-1).numpy())
    return count


def _in_one_pass(x_GK: Tensor, scale: Tensor, levels: Tensor, midpoints: Tensor) -> Tensor | None:
    """What ``_Levels.fake`` computes, with gradients; None where it has to be computed otherwise."""
    by_row = scale.shape == (len(x_GK), 1)
    if x_GK.dim() != 2 or not (by_row or scale.shape == x_GK.shape[1:]) or len(midpoints) > _FEW:
        return None
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (x_GK, scale)) or torch.compiler.is_compiling():
        return None
    nearest = _Nearest.apply(x_GK, scale, by_row, levels, midpoints)
    assert isinstance(nearest, Tensor)
    return nearest


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, by_row: bool, levels: Tensor, midpoints: Tensor) -> Tensor:
        from lowbit.numerics.loops import to_nearest  # numba is slow to import

        x, scale = x.detach().contiguous(), scale.detach().contiguous()
        y = torch.empty_like(x)
        to_nearest(x.numpy(), scale.view(-1).numpy(), by_row, midpoints.numpy(), levels.numpy(), y.numpy())
        ctx.save_for_backward(x, scale, y)
        ctx.by_row, ctx.ends = by_row, (levels.numpy()[0], levels.numpy()[-1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lowbit.numerics.loops import gradients_of_nearest

        x, scale, y = ctx.saved_tensors
        of_x, of_scale, g = torch.empty_like(x), torch.zeros_like(scale), grads[0].contiguous()
        lowest, highest = ctx.ends
        gradients_of_nearest(
            x.numpy(), scale.view(-1).numpy(), ctx.by_row, lowest, highest,
            y.numpy(), g.numpy(), of_x.numpy(), of_scale.view(-1).numpy(),
        )  # fmt: skip
        return of_x, of_scale, None, None, None


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``; on a CPU ``index_select`` is by far the fastest way."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


class _Levels:
    """Nearest-level coding; subclasses give ``bits`` and ``table()``."""

    bits: int
    kind: ClassVar[Any] = Affine
    ties_to_even: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("scale", floored=True),)

    def table(self) -> tuple[float, ...]:
        """Value of each code, in units of the scale; index = code. Unused codes repeat a level."""
        raise NotImplementedError

    @property
    def max_level(self) -> float:
        """The largest magnitude among the levels."""
        return max(abs(value) for value in self.table())

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        lowest, highest = min(self.table()), max(self.table())
        # The smallest scale that keeps both ends inside; if the levels are one-sided, the other side is clipped.
        scale = torch.zeros_like(hi_G1)
        if highest > 0:
            scale = torch.maximum(scale, hi_G1 / highest)
        if lowest < 0:
            scale = torch.maximum(scale, lo_G1 / lowest)
        return Affine(torch.where(scale > 0, scale, torch.full_like(scale, OF_NOTHING)))

    def encode(self, x_GK: Tensor, params: Affine) -> Tensor:
        _, codes, midpoints = self.sorted_levels(x_GK.device, params.scale.dtype)
        return _looked_up(codes, _rank(x_GK / params.scale, midpoints))

    def decode(self, codes_GK: Tensor, params: Affine) -> Tensor:
        table = torch.tensor(self.table(), dtype=params.scale.dtype, device=codes_GK.device)
        return _looked_up(table, codes_GK.int()) * params.scale

    def fake(self, x_GK: Tensor, params: Affine) -> Tensor:
        levels, _, midpoints = self.sorted_levels(x_GK.device, params.scale.dtype)
        nearest = _in_one_pass(x_GK, params.scale, levels, midpoints)
        if nearest is not None:
            return nearest
        v = x_GK / params.scale
        inside = v.clamp(levels[0].item(), levels[-1].item())
        nearest = _looked_up(levels, _rank(v.detach(), midpoints))
        return (nearest + (inside - inside.detach())) * params.scale  # the bracket is exactly zero, with a gradient

    def sorted_levels(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Levels in rising order, the code of each, and the midpoints between neighbours. Shared: not to be changed."""
        if torch.compiler.is_compiling():
            return _level_tensors(self.table(), self.ties_to_even, device, dtype)
        return _cached_level_tensors(self.table(), self.ties_to_even, device, dtype)


def _level_tensors(
    table: tuple[float, ...], ties_to_even: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    levels, codes = _sorted_levels(table)
    values = torch.tensor(levels, dtype=dtype, device=device)
    ranked = torch.tensor(codes, dtype=torch.uint8, device=device)
    midpoints = (values[1:] + values[:-1]) / 2
    if ties_to_even:  # of two neighbours one code is even; lowering the midpoint by one float sends a tie up
        midpoints = torch.where(ranked[:-1] % 2 == 1, midpoints.nextafter(values[:1] - 1), midpoints)
    return values, ranked, midpoints


_cached_level_tensors = lru_cache(torch.inference_mode(False)(_level_tensors))


@lru_cache
def _sorted_levels(table: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    first: dict[float, int] = {}
    for code, value in enumerate(table):
        first.setdefault(value, code)
    return tuple(sorted(first)), tuple(first[value] for value in sorted(first))


@serializable
@dataclass(frozen=True)
class Float(_Levels):
    """A floating format of 1 sign, ``exponent`` and ``mantissa`` bits with subnormals; a code is the bit pattern.

    A real exponent bias b (LLM-FP4, arXiv:2310.16836) is a scale: it multiplies every number, also subnormal ones, by
    ``2**(2**(exponent-1) - 1 - b)``. A search for the bias is therefore a search for the largest number
    ``(2 - 2**-mantissa) * 2**(2**exponent - 1 - b)``, and one kind of parameter places every format.

    Args:
        exponent: 1 to 5 exponent bits; the bias is ``2**(exponent-1) - 1``.
        mantissa: mantissa bits; 1 + exponent + mantissa is at most 8.
        special: which patterns are not numbers: ``"none"`` (E2M1 and small formats), ``"fn"`` (only the all-ones
            pattern: E4M3FN, largest 448) or ``"ieee"`` (the top exponent: E5M2, largest 57344).
        shared_exponent: the scale is a power of two, ``2**(floor(log2 absmax) - top)`` with top the exponent of the largest
            number (OCP Microscaling, arXiv:2310.10537). The largest magnitude falls into the highest binade, and values
            beyond the largest number are clipped.
    """

    exponent: int
    mantissa: int
    special: Literal["none", "fn", "ieee"] = "none"
    shared_exponent: bool = False
    ties_to_even: ClassVar[bool] = True

    def __post_init__(self):
        if not (1 <= self.exponent <= 5 and self.mantissa >= 0 and self.exponent + self.mantissa <= 7):
            raise ValueError(
                f"a floating grid has 1 to 5 exponent bits and at most 8 bits in all, "
                f"found E{self.exponent}M{self.mantissa}"
            )
        if self.special not in ("none", "fn", "ieee"):
            raise ValueError(f"special is 'none', 'fn' or 'ieee', found {self.special!r}")

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 + self.exponent + self.mantissa

    def table(self) -> tuple[float, ...]:
        return _float_table(self.exponent, self.mantissa, self.special)

    @staticmethod
    def of(bits: int, name: str | None = None) -> Float:
        """A format of ``bits`` in which every pattern is a number.

        Args:
            bits: width of a code.
            name: such as ``"E2M1"``; None: half of the bits are exponent.

        Raises:
            ValueError: a name that is not of this form, or has another number of bits.
        """
        if name is None:
            return Float(bits // 2, bits - 1 - bits // 2)
        widths = re.fullmatch(r"E(\d)M(\d)", name)
        if widths is None or int(widths[1]) + int(widths[2]) + 1 != bits:
            raise ValueError(
                f"a floating format of {bits} bits is called such as {Float.of(bits).name}, found {name!r}"
            )
        return Float(int(widths[1]), int(widths[2]))

    @property
    def name(self) -> str:
        """Such as ``"E2M1"``."""
        return f"E{self.exponent}M{self.mantissa}"

    def splits(self) -> tuple[Float, ...]:
        """This format, then all others of the same width with 1 to 5 exponent bits, by falling range."""
        widths = range(min(5, self.bits - 1), 0, -1)
        others = (replace(self, exponent=e, mantissa=self.bits - 1 - e) for e in widths if e != self.exponent)
        return (self, *others)

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        (scale, _) = super().from_range(lo_G1, hi_G1)
        if not self.shared_exponent:
            return Affine(scale)
        with torch.no_grad():
            _, above = torch.frexp(torch.maximum(lo_G1.abs(), hi_G1.abs()))  # absmax < 2**above <= 2 * absmax
            power = torch.ldexp(torch.ones_like(scale), above - 1 - (math.frexp(self.max_level)[1] - 1))
            power = torch.where((scale > OF_NOTHING) & (power > 0), power, torch.full_like(scale, OF_NOTHING))
        return Affine(scale + (power - scale).detach())  # the sum is exact: the two differ by at most a factor of two


@lru_cache
def _float_table(exponent: int, mantissa: int, special: str) -> tuple[float, ...]:
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    top = {"none": 2 ** (exponent + mantissa), "fn": 2 ** (exponent + mantissa) - 1, "ieee": (2**exponent - 1) * steps}
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        e, m = divmod(min(code, top[special] - 1), steps)  # patterns that are not numbers repeat the largest
        positive.append((m / steps) * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias))
    return tuple(positive) + tuple(-value for value in positive)


@serializable
@dataclass(frozen=True)
class Normal(_Levels):
    """The ``2 ** bits`` levels with the least squared error on a standard normal distribution (Lloyd and Max), 1 to 8 bits.

    For weights that a rotation made nearly normal. On a normal distribution at 2, 3, 4 and 5 bits their error is 1, 8, 18
    and 28 % smaller than that of the best integers, without a zero point. A code is an index, rising with its level.
    """

    bits: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"a grid of normal levels has 1 to 8 bits, found {self.bits}")

    def table(self) -> tuple[float, ...]:
        return _normal_table(self.bits)


@lru_cache
@torch.inference_mode(False)  # the first call may come from a model that generates
def _normal_table(bits: int) -> tuple[float, ...]:
    """Each level is the mean of its cell, and cells end at the midpoints between levels. Newton's method solves this for the
    positive half, from the quantiles of the density's cube root (Panter and Dite). Rounded to float32."""
    half = 2 ** (bits - 1)
    share = (torch.arange(half, dtype=torch.float64) + 0.5) / half
    x = math.sqrt(3) * math.sqrt(2) * torch.erfinv(share)
    moved = 1.0
    while moved > 1e-12:
        with torch.enable_grad():
            levels = x.clone().requires_grad_()
            rest = levels - _cell_means(levels)
            rows = [torch.autograd.grad(r, levels, retain_graph=True)[0] for r in rest]
        step = torch.linalg.solve(torch.stack(rows), rest.detach())
        x, moved = x - step, step.abs().max().item()
    positive = x.float().tolist()
    return (*(-value for value in reversed(positive)), *positive)


def _cell_means(levels: Tensor) -> Tensor:
    """Mean of a standard normal variable in each cell of the positive half."""
    zero, end = levels.new_zeros(1), levels.new_full((1,), 40.0)
    edges = torch.cat([zero, (levels[1:] + levels[:-1]) / 2, end])
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    above = torch.special.erfc(edges / math.sqrt(2)) / 2
    return (density[:-1] - density[1:]) / (above[:-1] - above[1:])


@serializable
@dataclass(frozen=True)
class Table(_Levels):
    """Given levels; a code is an index. See :data:`NF4`.

    Args:
        values: 2 to 256 numbers.
        absmax: the largest magnitude of a granule meets the largest level, whatever their signs, as in bitsandbytes. A table
            with unequal sides then clips a little when the extreme is on the shorter side.
        signed: scales have either sign: the largest magnitude of a granule meets the largest level, which has its sign then.
    """

    values: tuple[float, ...]
    absmax: bool = False
    signed: bool = False

    def __post_init__(self):
        if self.absmax and self.signed:
            raise ValueError(
                "a table's scales are of the largest magnitude (absmax) or have its sign too (signed), found both"
            )
        object.__setattr__(self, "values", tuple(self.values))
        if not all(abs(value) <= _LARGEST for value in self.values):
            raise ValueError("a table holds numbers of float32, found NaN, Inf or a larger one")
        if not 2 <= len(self.values) <= 256 or not any(self.values):
            raise ValueError(f"a table has 2 to 256 values, not all zero; found {len(self.values)}")

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (len(self.values) - 1).bit_length()

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field("scale", floored=True, signed=self.signed),)

    def table(self) -> tuple[float, ...]:
        return self.values

    def from_range(self, lo_G1: Tensor, hi_G1: Tensor) -> Affine:
        if self.signed:
            scale = torch.where(lo_G1.abs() >= hi_G1.abs(), lo_G1, hi_G1) / max(self.values, key=abs)
            return Affine(torch.where(scale != 0, scale, torch.full_like(scale, OF_NOTHING)))
        if not self.absmax:
            return super().from_range(lo_G1, hi_G1)
        scale = torch.maximum(lo_G1.abs(), hi_G1.abs()) / self.max_level
        return Affine(torch.where(scale > 0, scale, torch.full_like(scale, OF_NOTHING)))


NF4 = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""NormalFloat 4 (QLoRA, arXiv:2305.14314): 7 negative levels, zero, 8 positive; the values bitsandbytes writes."""

HALVES = Table((-1.5, -0.5, 0.5, 1.5))
"""Four half-integers, for 2 bits: no level is zero, and both signs have two (LLM-QAT, arXiv:2305.17888; ParetoQ,
arXiv:2502.02631)."""

FLINT4 = Table((-16.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0))
"""The signed 4-bit float-int hybrid of ANT (arXiv:2208.14286): integers near zero, powers of two far from it."""


FP4 = Table(tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)))
"""The 4-bit floating table of bitsandbytes, in the order of its codes. It is E2M1 except for the smallest number, which is
1/192 of the largest; E2M1 has 1/12."""


def powers_of_two(bits: int) -> Table:
    """The grid ``1, 1/2, 1/4, ...``; a code is the number of halvings. It stores scales relative to the largest of them."""
    return Table(tuple(2.0**-k for k in range(2**bits)))


def _dynamic_map(exponents: int = 7) -> tuple[float, ...]:
    """Signed numbers with ``exponents`` decimal exponents.

    Exponent e holds the midpoints of 2**e equal parts of [0.1, 1], times 10**(e - exponents + 1), with both signs; zero
    and one complete the 256. Computed in float32 as in bitsandbytes; in float64 some would round to a neighbour.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for e in range(exponents):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32)
        middle = 10.0 ** (e - exponents + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += [middle, -middle]
    return tuple(torch.cat(values).sort().values.tolist())


DYNAMIC_MAP = Table(_dynamic_map(), absmax=True)
"""The 8-bit table with a dynamic exponent (arXiv:2110.02861) in which bitsandbytes keeps the scales of NF4."""
