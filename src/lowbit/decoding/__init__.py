"""Decoding at the speed of memory: a packed model runs one token by one compiled call, inside transformers' own forward."""

from lowbit.decoding.cache import Growing
from lowbit.decoding.model import explain, install, uninstall

__all__ = ["Growing", "explain", "install", "uninstall"]
