"""What a run would do and cost, before it: from config.json and the headers of the shards, in seconds.

:func:`plan` answers what comes out and what it takes; :func:`explain` says, step by step, what would happen to each
layer. Both raise what a run would raise about its request, before any weight is read.
"""

from lowbit.plan.explanation import Explanation, explain
from lowbit.plan.foresight import Plan, plan
from lowbit.plan.layers import PlannedLayer

__all__ = ["Explanation", "Plan", "PlannedLayer", "explain", "plan"]
