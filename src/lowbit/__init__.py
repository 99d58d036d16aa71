"""lowbit: quantize large language models by any published method, run them packed, and measure what it cost.

Importing this package makes ``quant_method: "lowbit"`` known to transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads its checkpoints. It touches no device and loads no model.

Some names are both a function here and a module (``lowbit.recipe("gptq")``, ``from lowbit.recipes import Recipe``): every
module is imported first, so that the functions below are what the names mean.
"""

from lowbit import methods as _methods  # noqa: F401  (fills the registry of methods)
from lowbit.allocation import Allocation, allocate
from lowbit.api import ExportReport, evaluate, export, list_methods, load, load_tokenizer
from lowbit.comparison import compare
from lowbit.linear_api import quantize_linear
from lowbit.pipeline import BrokenModel, QuantizeReport, quantize
from lowbit.recipes import Recipe, recipe
from lowbit.version import __version__

__all__ = [
    "Allocation",
    "BrokenModel",
    "ExportReport",
    "QuantizeReport",
    "Recipe",
    "__version__",
    "allocate",
    "compare",
    "evaluate",
    "export",
    "list_methods",
    "load",
    "load_tokenizer",
    "quantize",
    "quantize_linear",
    "recipe",
]
