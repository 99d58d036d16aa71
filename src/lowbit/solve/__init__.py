"""Weight solvers: codes for one weight matrix, from its values and, where the solver needs them, its inputs' statistics."""

from lowbit.solve.base import Solution, Solver
from lowbit.solve.gptq import Gptq
from lowbit.solve.nearest import Nearest

__all__ = ["Gptq", "Nearest", "Solution", "Solver"]
