"""Round to nearest: the baseline for every other method."""

from lowbit.numerics import ClipSearch, MinMax
from lowbit.recipes import Recipe, method
from lowbit.scheme import activation, linears, weight
from lowbit.solve import Nearest
from lowbit.steps import Solve


@method("rtn", family="weight-only", paper="")
def rtn(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = False,
    activation_bits: int | None = None,
    mse: bool = False,
    importance: bool = False,
) -> Recipe:
    """Every weight takes the nearest value of its group's grid; nothing is calibrated.

    * bits: width of a weight.
    * group_size: consecutive weights of a row that share a scale; None: one scale for each output channel.
    * symmetric: no zero point.
    * activation_bits: also quantize each linear's input, per token, symmetric.
    * mse: shrink each range to the least error (norm 2.4); otherwise it covers the extremes.
    * importance: weigh errors by the mean square of each input, from calibration text or from an importance matrix of llama.cpp
      (`--calibration FILE.gguf`); implies mse.
    """
    fit = ClipSearch() if mse or importance else MinMax()
    return Recipe.blockwise(
        name="rtn",
        scheme=linears(weight(bits, group_size, symmetric=symmetric), activation(activation_bits)),
        steps=(Solve(Nearest(fit, importance="inputs" if importance else "none")),),
    )
