"""Weight solvers: codes for one weight matrix, from its values and, where needed, statistics of its inputs."""

from lowbit.solve.base import Solution, Solver
from lowbit.solve.gptq import Gptq
from lowbit.solve.nearest import Nearest

__all__ = ["Gptq", "Nearest", "Solution", "Solver"]
