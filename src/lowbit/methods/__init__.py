"""Published methods, one a file; importing this package registers them. README.md says how to add one."""

from lowbit.methods import (
    autoround,
    awq,
    gptq,
    hqq,
    lut_gemm,
    nf4,
    omniquant,
    owq,
    quip,
    rptq,
    rtn,
    smoothquant,
    spqr,
    squeezellm,
    zeroquant,
)

__all__ = [
    "autoround",
    "awq",
    "gptq",
    "hqq",
    "lut_gemm",
    "nf4",
    "omniquant",
    "owq",
    "quip",
    "rptq",
    "rtn",
    "smoothquant",
    "spqr",
    "squeezellm",
    "zeroquant",
]
