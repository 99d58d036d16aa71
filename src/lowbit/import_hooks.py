"""Makes lowbit known to transformers and to peft as soon as they can be told, without importing them.

transformers keeps its quantizers in ``transformers.quantizers.auto``, which it imports before it loads any model; peft keeps
what a ``LoraConfig`` is in ``peft.tuners.lora.config``. Where such a module is loaded already, it is told at once. If not, a
finder on ``sys.meta_path`` waits for its import, lets the usual finders load it, and tells it right after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder:
    """Finds only the host modules, through the other finders, and adds the registration to their execution.

    It stays installed, so that a reload of a host registers again. It does not inherit from importlib.abc's class, which
    would double the time of ``import lowbit``.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOSTS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _HOSTS[fullname](module)

            # Set on the loader that the import system made for this one import: it stays what it is for everyone else
            # (inspect reads sources through it).
            spec.loader.exec_module = exec_module
        return spec


def _register_quantizer(host: ModuleType) -> None:
    # Imported only now. The module imports nothing from transformers beyond what the host module has imported itself, so
    # it does not matter how far the rest of transformers has been loaded.
    from lowbit.checkpoints.transformers_plugin import register

    register()


def _register_adapter(host: ModuleType) -> None:
    """Every ``LoraConfig`` says from now on how a packed linear is adapted, also one that peft reads from a file."""
    made = host.LoraConfig.__post_init__

    @wraps(made)
    def with_packed(config: Any) -> None:
        made(config)
        from lowbit.adapters.packed_lora import PackedLora  # not before peft is whole
        from lowbit.modules import QuantLinear

        config._register_custom_module({QuantLinear: PackedLora})

    host.LoraConfig.__post_init__ = with_packed


def _register_linears(host: Any) -> None:
    """``target_modules="all-linear"`` names packed linears too, which peft knows by no class of its own. Packed layers among
    ``modules_to_save`` are refused: peft would copy them, and there is nothing in a copy to train or to load."""
    usual = getattr(
        host, "_maybe_include_all_linear_layers", None
    )  # not public: a peft without it finds ordinary linears
    if usual is None:
        return

    @wraps(usual)
    def with_packed(config: Any, model: Any) -> Any:
        from lowbit.adapters.packed_lora import check_saved_modules, packed_linears  # not before peft is whole

        asked = getattr(config, "target_modules", None)
        check_saved_modules(model, getattr(config, "modules_to_save", None) or ())
        config = usual(config, model)
        if isinstance(asked, str) and isinstance(config.target_modules, set):
            config.target_modules |= packed_linears(model)
        return config

    host._maybe_include_all_linear_layers = with_packed


_HOSTS = {
    "transformers.quantizers.auto": _register_quantizer,
    "peft.tuners.lora.config": _register_adapter,
    "peft.tuners.tuners_utils": _register_linears,
}


def install() -> None:
    """Registers now, or when the hosts are imported. Called by ``import lowbit``."""
    for name, register in _HOSTS.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
