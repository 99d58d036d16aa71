"""SqueezeLLM: a table of values for each output channel, fitted by the sensitivity of the loss, and outliers in float16."""

from lowbit.numerics import Codebook, KMeans, PerChannel, PerGroup, Spec
from lowbit.recipes import Recipe, method
from lowbit.scheme import linears
from lowbit.solve import Nearest, RangeOutliers, Sensitive
from lowbit.steps import Solve


@method("squeezellm", family="weight-only", paper="arXiv:2306.07629")
def squeezellm(
    bits: int = 4, group_size: int | None = None, *, sparsity: float = 0.0045, sensitive: float = 0.0005
) -> Recipe:
    """Tables by k-means weighed with Fisher information, and a share of the weights kept in float16.

    * bits: 1 to 8; a table has 2^bits values of 16 bits.
    * group_size: weights of a row that share a table, which can be larger than a small group itself; None, as published: one
      table for each output channel.
    * sparsity: share of each matrix kept because it is large: beyond max(|q1 - t IQR|, |q3 + t IQR|), with t such that the
      share is reached. These are the largest magnitudes. The authors tune one t for the whole model by hand.
    * sensitive: share of each matrix kept because its Fisher information is largest; chosen first.

    The Fisher information is that of the original model: squared gradients summed over calibration windows, in float32. The
    k-means is exact; the authors' takes up to 50 rounds from a random start.
    """
    rules = (*((Sensitive(sensitive),) if sensitive else ()), *((RangeOutliers(sparsity),) if sparsity else ()))
    grain = PerChannel() if group_size is None else PerGroup(group_size)
    return Recipe.blockwise(
        name="squeezellm",
        scheme=linears(Spec(Codebook(bits), grain)),
        steps=(Solve(Nearest(KMeans(), outliers=rules or None, importance="fisher")),),
    )
