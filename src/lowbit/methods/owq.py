"""OWQ: the input columns that meet outlier activations stay in float16 and absorb the error of all others."""

from typing import Literal

from lowbit.numerics import MinMax, TruncationSearch
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears, weight
from lowbit.solve import Gptq, WeakColumns
from lowbit.steps import Solve


@method("owq", family="weight-only", paper="arXiv:2306.02272")
def owq(
    bits: int = 3,
    group_size: int | None = None,
    *,
    target_bits: float | None = None,
    kept_columns: int | None = None,
    symmetric: bool = False,
    order: Literal["none", "act", "group"] = "group",
    damp: float = 0.1,
    mse: bool = True,
    greedy_passes: int = 3,
    true_sequential: bool = False,
) -> Recipe:
    """Second-order rounding; weak columns stay in float16, chosen by Hessian diagonal times squared perturbation.

    * target_bits: stored bits for each weight of a linear, with scales, indices and kept columns counted; as many columns are
      kept as fit. Default: 0.1 more than the codes and the scales of their groups.
    * kept_columns: number of kept columns instead.
    * symmetric: no zero point.
    * order: of columns by falling sensitivity, as in gptq ("act" and "group" are equal without groups).
    * damp, greedy_passes, true_sequential: as in gptq.
    * mse: search the width of each range and its zero point.

    The packed layer holds the kept columns in their own buffers (index, value), so they can be trained alone afterwards (weak
    column tuning). With groups they stay inside their groups, whose grids are placed without them.

    Differs from the authors' code: their budget assumes blocks of 12 d^2 weights and gives MLP linears less than attention, so
    it leaves scales out (a target of 3.01 stores 3.03 bits in a linear of 1536 inputs) and misses the target if heads share keys and values or q, k and v are one linear. Here each linear keeps as much as its own
    shape allows. Theirs: order="none", damp=0.01, greedy_passes=0, and ranges searched in 100 steps.
    """
    if target_bits is not None and kept_columns is not None:
        raise ValueError("target_bits and kept_columns both say how many columns are kept; give one of them")
    if kept_columns is None and target_bits is None:
        target_bits = bits + 0.1 + (0 if group_size is None else (16 + (0 if symmetric else bits)) / group_size)
    solver = Gptq(
        fit=TruncationSearch(steps=25) if mse else MinMax(),
        order=order,
        rank="perturbation",
        damp=damp,
        outliers=WeakColumns(kept_columns, target_bits),
        greedy_passes=greedy_passes,
    )
    scheme = linears(weight(bits, group_size, symmetric=symmetric))
    return Recipe.blockwise(name="owq", scheme=scheme, steps=(Solve(solver, true_sequential),))
