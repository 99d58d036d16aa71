"""Packed caches of keys and values, as layers of transformers' caches."""

from lowbit.caches.cache import PackedCache
from lowbit.caches.coordinates import Coordinates
from lowbit.caches.layer import PackedLayer

__all__ = ["Coordinates", "PackedCache", "PackedLayer"]
