"""OliVe: an outlier takes the bits of its neighbour, so that four bits a value hold both without an index."""

from typing import Literal

from lowbit.modules import ActSpec
from lowbit.numerics import FLINT4, Grid, Int, OutlierVictim, PerChannel, PerGroup, PerTensor, RangeSearch, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Nearest
from lowbit.steps import ChooseGrid, FitActivation, Solve


@method("olive", family="weight-activation", paper="arXiv:2304.07493")
def olive(
    bits: int = 4,
    activation_bits: int | None = 4,
    group_size: int | None = None,
    *,
    normal: Literal["int", "flint", "best"] = "best",
    keep: Literal["first", "nearest"] = "first",
    outliers: bool = True,
    tokens: int = 1024,
) -> Recipe:
    """Outlier-victim pairs for weights and activations, each placed by a search over multiples of its three sigmas.

    bits: 3 to 8, one scale an output channel, or a group of group_size. activation_bits: of each linear's input, one static
    scale a tensor, fitted on the first so many calibration tokens; the authors take the first batch that the model sees.
    normal: the values beside outliers, "int", "flint" (4 bits), or "best", for every tensor the one that loses less of it;
    each packed layer's format says which. keep: of two neighbours that are outliers the even one stays ("first", as published),
    or a pair is coded as loses least ("nearest"), in the same bits.
    outliers: false gives the plain number types, searched over multiples of the largest magnitude: ANT (arXiv:2208.14286).

    At 8 bits outliers are E2M5, as the authors' code has them; the paper says E4M3. Their option to give the layers that
    lose most 8 bits is an override here. Solvers that round column by column cannot code pairs.
    """

    def grids(width: int) -> tuple[Grid, ...]:
        types = (normal,) if normal != "best" else ("int", "flint") if width == 4 else ("int",)
        pairs = tuple(OutlierVictim(width, each, keep) for each in types)
        return pairs if outliers else tuple(Int(width, symmetric=True) if p.normal == "int" else FLINT4 for p in pairs)

    fit = RangeSearch("sigma" if outliers else "absmax")
    choose = (ChooseGrid(grids(bits), fit),) if len(grids(bits)) > 1 else ()
    act, place = None, ()
    if activation_bits is not None and activation_bits < 16:
        act = ActSpec(Spec(grids(activation_bits)[0], PerTensor(), scale_dtype="float32"), static=True)
        place = (FitActivation(fit, grids(activation_bits), tokens),)
    spec = Spec(grids(bits)[0], PerChannel() if group_size is None else PerGroup(group_size))
    return Recipe.blockwise(name="olive", scheme=linears(spec, act), steps=(*choose, *place, Solve(Nearest(fit))))
