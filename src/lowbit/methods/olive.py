"""OliVe: an outlier uses the bits of its neighbour, so values and outliers fit into four bits without an index."""

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
    """Outlier-victim pairs for weights and activations, each placed by a search over multiples of three standard deviations.

    * bits: 3 to 8, of weights.
    * activation_bits: of each linear's input, with one static scale for the tensor.
    * group_size: of weights; None: one scale for each output channel.
    * normal: the values that are not outliers: "int", "flint" (4 bits), or "best", the one with the smaller error on each
      tensor, which the format of each packed layer records.
    * keep: of two neighbouring outliers "first" keeps the even one, as published; "nearest" codes each pair with the least
      error, in the same bits.
    * outliers: false: plain number types, searched over multiples of the largest magnitude, as in ANT (arXiv:2208.14286).
    * tokens: the first calibration tokens, which fit the input's scale; the authors use the first batch of the model.

    At 8 bits outliers are E2M5, as in the authors' code; the paper says E4M3. Their option of 8 bits for the layers with the
    largest errors is an override here. Solvers that round column by column cannot code pairs.
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
