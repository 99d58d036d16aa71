"""SpQR: very small groups with quantized scales and zero points, and single outlier weights in float16."""

from typing import Literal

from lowbit.numerics import Int, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Gptq, LeaveOneOut
from lowbit.steps import Solve


@method("spqr", family="weight-only", paper="arXiv:2306.03078")
def spqr(
    bits: int = 3,
    group_size: int = 16,
    *,
    stats_bits: int = 3,
    stats_group: int = 16,
    threshold: float = 0.235,
    simplified: bool = False,
    order: Literal["none", "act", "group"] = "act",
    damp: float = 0.3,
    greedy_passes: int = 3,
    true_sequential: bool = False,
) -> Recipe:
    """Second-order rounding that keeps single outliers in float16, over small groups with quantized scales and zeros.

    * stats_bits, stats_group: width of the quantized scales and real zero points, in runs of stats_group rows.
    * threshold: a weight is kept if its scaled squared error exceeds it; larger values keep fewer, infinity (inf) none.
    * simplified: no leave-one-out test for the weights that a group's range ignores.
    * order: "act", as in the authors' code, forms groups by falling Hessian diagonal and stores the order (32 bits for each
      input channel); "group" stores none, and has larger errors if a few channels dominate.
    * damp, greedy_passes, true_sequential: as in gptq.

    Outliers are stored additively, as the difference to the decoded code of zero, so every decoder agrees. The bits include
    what the paper's formula leaves out (row offsets, the order of columns). The authors' settings are threshold=0.2, damp=1,
    greedy_passes=0; the defaults here reach their error with these bits counted too.
    """
    stats = Spec(Int(stats_bits, zero="real"), PerGroup(stats_group))
    solver = Gptq(
        order=order,
        damp=damp,
        outliers=None if threshold == float("inf") else LeaveOneOut(threshold, simplified),
        greedy_passes=greedy_passes,
    )
    scheme = linears(Spec(Int(bits, zero="real"), PerGroup(group_size), stats))
    return Recipe.blockwise(name="spqr", scheme=scheme, steps=(Solve(solver, true_sequential),))
