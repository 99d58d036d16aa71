"""Decoding at the speed of memory: one compiled call runs one token of a packed model, inside transformers' forward."""

from lowbit.decoding.cache import Growing
from lowbit.decoding.model import cache_argument, explain, install, uninstall, use_cache

__all__ = ["Growing", "cache_argument", "explain", "install", "uninstall", "use_cache"]
