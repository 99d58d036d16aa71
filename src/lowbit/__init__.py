"""lowbit: quantize large language models by any published method, run them packed, and measure what it cost.

After ``import lowbit``, transformers reads its checkpoints: ``AutoModelForCausalLM.from_pretrained`` knows
``quant_method: "lowbit"``. Importing touches no device, loads no model, and imports neither torch nor transformers: each
public name is imported when it is first used (PEP 562).
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

from lowbit import import_hooks as _import_hooks
from lowbit.version import __version__

if TYPE_CHECKING:  # what _HOMES says, for type checkers and editors; a test compares the two
    from lowbit.allocation import Allocation, allocate
    from lowbit.api import (
        ExportReport,
        evaluate,
        evaluate_chat,
        evaluate_tasks,
        export,
        kv_cache,
        load,
        load_tokenizer,
    )
    from lowbit.catalog import list_methods
    from lowbit.comparison import compare
    from lowbit.data_generation import GeneratedData, generate_data
    from lowbit.linear_api import quantize_linear
    from lowbit.merging import MergeReport, merge_adapter
    from lowbit.pipeline import quantize
    from lowbit.recipes import Recipe, recipe
    from lowbit.report import BrokenModel, QuantizeReport
    from lowbit.retraining import TrainReport, train

__all__ = [
    "Allocation",
    "BrokenModel",
    "ExportReport",
    "GeneratedData",
    "MergeReport",
    "QuantizeReport",
    "Recipe",
    "TrainReport",
    "__version__",
    "allocate",
    "compare",
    "evaluate",
    "evaluate_chat",
    "evaluate_tasks",
    "export",
    "generate_data",
    "kv_cache",
    "list_methods",
    "load",
    "load_tokenizer",
    "merge_adapter",
    "quantize",
    "quantize_linear",
    "recipe",
    "train",
]

_HOMES = {
    "Allocation": "lowbit.allocation",
    "BrokenModel": "lowbit.report",
    "ExportReport": "lowbit.api",
    "GeneratedData": "lowbit.data_generation",
    "MergeReport": "lowbit.merging",
    "QuantizeReport": "lowbit.report",
    "Recipe": "lowbit.recipes",
    "TrainReport": "lowbit.retraining",
    "allocate": "lowbit.allocation",
    "compare": "lowbit.comparison",
    "evaluate": "lowbit.api",
    "evaluate_chat": "lowbit.api",
    "evaluate_tasks": "lowbit.api",
    "export": "lowbit.api",
    "generate_data": "lowbit.data_generation",
    "kv_cache": "lowbit.api",
    "list_methods": "lowbit.catalog",
    "load": "lowbit.api",
    "load_tokenizer": "lowbit.api",
    "merge_adapter": "lowbit.merging",
    "quantize": "lowbit.pipeline",
    "quantize_linear": "lowbit.linear_api",
    "recipe": "lowbit.recipes",
    "train": "lowbit.retraining",
}
"""The module that each public name is imported from."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(_import_module(_HOMES[name]), name)
        return value
    if not name.startswith("_") and _find_spec(f"lowbit.{name}") is not None:
        return _import_module(f"lowbit.{name}")  # lowbit.decoding.explain after import lowbit alone
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_import_hooks.install()
