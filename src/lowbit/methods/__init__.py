"""Published methods, one a file; importing this package registers them. README.md says how to add one."""

from lowbit.methods import awq, gptq, hqq, lut_gemm, nf4, omniquant, owq, quip, rtn, smoothquant, spqr, squeezellm

__all__ = [
    "awq",
    "gptq",
    "hqq",
    "lut_gemm",
    "nf4",
    "omniquant",
    "owq",
    "quip",
    "rtn",
    "smoothquant",
    "spqr",
    "squeezellm",
]
