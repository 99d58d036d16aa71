"""Packed caches of keys and values, as layers of transformers' caches."""

from lowbit.caches.attention import attend_packed
from lowbit.caches.cache import PackedCache, format_of
from lowbit.caches.coordinates import Coordinates, calibrated_coordinates
from lowbit.caches.fits import CacheFit, Extremes, Operands, SecondMoments
from lowbit.caches.layer import PackedLayer
from lowbit.caches.simulated import CacheGradients, attend_simulated
from lowbit.caches.states import PackedStates

__all__ = [
    "CacheFit",
    "CacheGradients",
    "Coordinates",
    "Extremes",
    "Operands",
    "PackedCache",
    "PackedLayer",
    "PackedStates",
    "SecondMoments",
    "attend_packed",
    "attend_simulated",
    "calibrated_coordinates",
    "format_of",
]
