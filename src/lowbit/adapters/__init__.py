"""Adapters of peft beside packed linears, and what they add put into the packed weight."""

from lowbit.adapters.merge import merged_layer

__all__ = ["merged_layer"]
