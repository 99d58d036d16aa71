"""Weight solvers: codes for one weight matrix, from its values and, if needed, statistics of its inputs."""

from lowbit.solve.adapter import Adapter
from lowbit.solve.base import FEW_TOKENS, Solution, Solver
from lowbit.solve.gptq import Gptq
from lowbit.solve.nearest import Nearest
from lowbit.solve.outliers import LeaveOneOut, OutlierRule, RangeOutliers, ReachingColumns, Sensitive, WeakColumns
from lowbit.solve.sign_value import SignValue

__all__ = [
    "FEW_TOKENS",
    "Adapter",
    "Gptq",
    "LeaveOneOut",
    "Nearest",
    "OutlierRule",
    "RangeOutliers",
    "ReachingColumns",
    "Sensitive",
    "SignValue",
    "Solution",
    "Solver",
    "WeakColumns",
]
