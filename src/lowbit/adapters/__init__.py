"""Adapters of peft beside packed linears, and what they add put into the packed weight, or taken out of it."""

from lowbit.adapters.apart import Apart, apart, has_terms, why_inseparable, without_terms
from lowbit.adapters.merge import merged_layer

__all__ = ["Apart", "apart", "has_terms", "merged_layer", "why_inseparable", "without_terms"]
