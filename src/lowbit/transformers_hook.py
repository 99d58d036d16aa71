"""Makes ``quant_method: "lowbit"`` known to transformers as soon as transformers can be told, without importing it.

transformers keeps its quantizers in ``transformers.quantizers.auto``, which it imports before it loads any model. If that
module is loaded already, our quantizer is registered at once. If not, a finder on ``sys.meta_path`` waits for the import of
that one module, lets the usual finders load it, and registers our quantizer right after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_HOST = "transformers.quantizers.auto"


class _Finder:
    """Finds only the host module, through the other finders, and adds the registration to its execution.

    It stays installed, so that a reload of the host registers again. It does not inherit from importlib.abc's class, which
    would double the time of ``import lowbit``.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOST:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            # Set on the loader that the import system made for this one import: it stays what it is for everyone else
            # (inspect reads sources through it).
            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    # Imported only now. The module imports nothing from transformers beyond what the host module has imported itself, so
    # it does not matter how far the rest of transformers has been loaded.
    from lowbit.checkpoints.transformers_plugin import register

    register()


def install() -> None:
    """Registers now, or when transformers is ready. Called by ``import lowbit``."""
    if _HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
