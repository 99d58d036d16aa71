"""Published methods, one a file; importing this package registers them. README.md says how to add one."""

from lowbit.methods import awq, gptq, omniquant, rtn, smoothquant

__all__ = ["awq", "gptq", "omniquant", "rtn", "smoothquant"]
