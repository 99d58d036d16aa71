"""Packed caches of keys and values, as layers of transformers' caches."""

from lowbit.caches.attention import attend_packed
from lowbit.caches.cache import PackedCache, format_of
from lowbit.caches.coordinates import Coordinates
from lowbit.caches.layer import PackedLayer
from lowbit.caches.simulated import attend_simulated
from lowbit.caches.states import PackedStates

__all__ = [
    "Coordinates",
    "PackedCache",
    "PackedLayer",
    "PackedStates",
    "attend_packed",
    "attend_simulated",
    "format_of",
]
