"""Packed caches of keys and values, as layers of transformers' caches."""

from lowbit.caches.cache import PackedCache, format_of
from lowbit.caches.coordinates import Coordinates
from lowbit.caches.layer import PackedLayer

__all__ = ["Coordinates", "PackedCache", "PackedLayer", "format_of"]
