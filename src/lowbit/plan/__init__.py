"""Plans: what a run would do and cost, from config.json and the shard headers, in seconds.

:func:`plan` says what comes out and what the run takes. :func:`explain` says, step by step, what happens to each layer.
Both raise what a run would raise for the same request, before any weight is read.
"""

from lowbit.plan.explanation import Explanation, explain
from lowbit.plan.foresight import Plan, plan
from lowbit.plan.layers import PlannedLayer

__all__ = ["Explanation", "Plan", "PlannedLayer", "explain", "plan"]
