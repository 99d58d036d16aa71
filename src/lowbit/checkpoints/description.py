"""What a native checkpoint stores, as a value, and its JSON: the ``quantization_config`` of its config.json.

    {"quant_method": "lowbit", "version": 1,
     "schemes": [description of a packed linear, ...], "layers": {module name: index into schemes, ...},
     "unfused_experts": true,                                  (only where experts were taken apart)
     "attention": [[formats of its operands, [module that attends, ...]], ...],       (only where they are quantized)
     "residual": {"type": "RandomHadamard", "seed": 1, "size": 576, "blocks": "model.layers"},  (only where it is rotated)
     "kv": formats of the cache,                               (only where it is quantized)
     "kv_overrides": [{"layers": [0, -1], "kv": formats or null}, ...],      (only where some layers' caches have others)
     "kv_calibration": [[{"heads": [3, 64, 64], "buffers": ["key_rotation", ...]}, [module that attends, ...]], ...],
                                                               (only where calibration found something for the cache)
     "embeddings": {module name: index into schemes, ...},     (only where they are packed)
     "tied_heads": {module name: name of its embedding, ...}}  (only where a packed embedding is the output head too)

It says what is stored, never how it was chosen. Blocks repeat, so a model of hundreds of layers has a handful of
schemes. Everything is written in sorted order: the same model gives the same bytes.

Version 2 is version 1 with layers that transform their output or have side terms. Version 3 is of models whose attention
quantizes its operands, or whose residual stream is rotated between their first block and their last. Version 4 is of models
with a quantized cache, version 5 of models with packed embeddings, version 6 of models whose layers' caches differ, version 7
of models that carry what calibration found for their caches, version 8 of models that store the rotation of their residual stream as a
matrix ("StoredRotation", without a seed). Readers of an older version would pass these over, so the oldest
that says everything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from lowbit.architectures import attention_spec
from lowbit.modules import (
    AttentionSpec,
    CalibrationSpec,
    KVFormats,
    KVRule,
    KVSpec,
    LinearDescription,
    QuantEmbedding,
    QuantLinear,
    ResidualRotation,
    calibrations,
    kv_formats,
    residual_of,
)
from lowbit.modules.quant_embedding import check_table
from lowbit.numerics import check_types, from_dict, to_dict

METHOD = "lowbit"
VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class ModelDescription:
    """A quantized model without its tensors.

    Attributes:
        layers: the packed linears by module name.
        attention: the formats of attention's operands, by name of the module that attends.
        kv: the formats of the cache; None: it is not quantized.
        kv_overrides: other formats of the cache of some layers.
        kv_calibration: what calibration found for the cache, by name of the module that attends.
        residual: the rotation of the residual stream; None: it is not rotated.
        unfused_experts: the names are those of a model whose experts were taken apart.
        embeddings: the packed embeddings by module name, each as a linear from channels to the vocabulary.
        tied_heads: output heads that are an embedding's table: module name -> name of the embedding.
    """

    layers: Mapping[str, LinearDescription]
    attention: Mapping[str, AttentionSpec] = field(default_factory=dict)
    kv: KVSpec | None = None
    residual: ResidualRotation | None = None
    unfused_experts: bool = False
    embeddings: Mapping[str, LinearDescription] = field(default_factory=dict)
    tied_heads: Mapping[str, str] = field(default_factory=dict)
    kv_overrides: tuple[KVRule, ...] = ()
    kv_calibration: Mapping[str, CalibrationSpec] = field(default_factory=dict)

    @property
    def cache(self) -> KVFormats:
        """The formats of the cache of all layers."""
        return KVFormats(self.kv, self.kv_overrides)

    @classmethod
    def of(cls, model: nn.Module) -> ModelDescription:
        """The description of a quantized model in memory."""
        specs = {name: attention_spec(module) for name, module in model.named_modules()}
        tables = {name: module for name, module in model.named_modules() if isinstance(module, QuantEmbedding)}
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        tied = {name: table for name, linear in linears.items() if linear.is_tied for table in tables}
        return cls(
            layers={name: module.description for name, module in linears.items() if name not in tied},
            attention={name: spec for name, spec in specs.items() if spec is not None},
            kv=kv_formats(model).kv,
            kv_overrides=kv_formats(model).overrides,
            kv_calibration={name: calibration.spec for name, _, calibration in calibrations(model)},
            residual=residual_of(model),
            unfused_experts=has_unfused_experts(model),
            embeddings={name: table.description for name, table in tables.items()},
            tied_heads=tied,
        )

    @property
    def version(self) -> int:
        """The oldest version of the native format that says everything."""
        if self.residual is not None and self.residual.tensor is not None:
            return 8
        if self.kv_calibration:
            return 7
        if self.kv_overrides:
            return 6
        if self.embeddings:
            return 5
        if self.kv is not None:
            return 4
        if self.attention or self.residual is not None:
            return 3
        return 2 if any(layer.post or layer.side_terms for layer in self.layers.values()) else 1

    @property
    def guarded(self) -> str | None:
        """A parameter of the unquantized model that the checkpoint has with a shape of its own, without values.

        transformers without lowbit passes over the ``quantization_config`` that it does not know and gives parameters that it
        does not find random values, with a warning. A parameter of another shape makes it raise.
        """
        names = self.embeddings or [name for name in self.layers if not _OF_EXPERT.search(f".{name}")]
        return f"{min(names)}.weight" if names else None

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads, in sorted order.

        Raises:
            ValueError: nothing is quantized.
        """
        if not self.layers and not self.cache:
            raise ValueError("no layer is quantized; expected at least one QuantLinear, or formats of the cache")
        schemes: dict[str, int] = {}

        def numbers(layers: Mapping[str, LinearDescription]) -> dict[str, int]:
            found = {}
            for name in sorted(layers, key=_natural):
                scheme = json.dumps(layers[name].to_json(), sort_keys=True)
                found[name] = schemes.setdefault(scheme, len(schemes))
            return found

        layers, embeddings = numbers(self.layers), numbers(self.embeddings)
        data: dict[str, Any] = {
            "quant_method": METHOD,
            "version": self.version,
            "schemes": [json.loads(scheme) for scheme in schemes],
            "layers": layers,
        }
        if self.unfused_experts:
            data["unfused_experts"] = True
        if self.attention:
            data["attention"] = _by_value(self.attention)
        if self.residual is not None:
            data["residual"] = self.residual.to_json()
        if self.kv is not None:
            data["kv"] = to_dict(self.kv)
        if self.kv_overrides:
            data["kv_overrides"] = [to_dict(rule) for rule in self.kv_overrides]
        if self.kv_calibration:
            data["kv_calibration"] = _by_value(self.kv_calibration)
        if embeddings:
            data["embeddings"] = embeddings
        if self.tied_heads:
            data["tied_heads"] = dict(sorted(self.tied_heads.items()))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelDescription:
        """The description that :meth:`to_json` of this version or an older one wrote.

        Raises:
            ValueError: another method, a version this code does not know, or a damaged description.
        """
        try:
            return cls._read(data)
        except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"quantization_config is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> ModelDescription:
        if data.get("quant_method") != METHOD:
            raise ValueError(f"quant_method is {data.get('quant_method')!r:.100}, expected {METHOD!r}")
        version = data.get("version")
        if type(version) is not int or version not in VERSIONS:
            raise ValueError(
                f"the checkpoint is of version {version!r:.100} of the native format, this lowbit reads "
                f"versions {VERSIONS[0]} to {VERSIONS[-1]}; use a lowbit that wrote such checkpoints"
            )
        cache = _cache(data)
        schemes, layers = data.get("schemes"), data.get("layers")
        if not isinstance(schemes, list | tuple) or not isinstance(layers, Mapping) or not (layers or cache):
            raise ValueError("quantization_config is damaged: expected a list 'schemes' and an object 'layers'")
        embeddings, tied = data.get("embeddings", {}), data.get("tied_heads", {})
        if not isinstance(embeddings, Mapping) or not isinstance(tied, Mapping):
            raise ValueError("quantization_config is damaged: embeddings and tied_heads are objects")
        numbers = {**layers, **embeddings}
        described = [_scheme(number, scheme, numbers) for number, scheme in enumerate(schemes)]
        for name, number in numbers.items():
            if type(number) is not int or not 0 <= number < len(described):
                raise ValueError(
                    f"quantization_config is damaged: {name} has scheme {number!r:.100} of {len(described)}"
                )
        for name, table in tied.items():
            if table not in embeddings or name in layers:
                raise ValueError(
                    f"quantization_config is damaged: {name} is tied to {table!r:.100}, no packed embedding"
                )
        for name, number in embeddings.items():
            try:
                check_table(described[number])
            except ValueError as error:
                raise ValueError(f"quantization_config is damaged: embedding {name}: {error}") from error
        residual, unfused = data.get("residual"), data.get("unfused_experts", False)
        if not isinstance(unfused, bool):
            raise ValueError(
                f"quantization_config is damaged: unfused_experts is true or false, found {unfused!r:.100}"
            )
        return cls(
            layers={name: described[number] for name, number in layers.items()},
            attention=_of_modules(data, "attention", AttentionSpec),
            kv=cache.kv,
            kv_overrides=cache.overrides,
            kv_calibration=_of_modules(data, "kv_calibration", CalibrationSpec),
            residual=None if residual is None else ResidualRotation.from_json(residual),
            unfused_experts=unfused,
            embeddings={name: described[number] for name, number in embeddings.items()},
            tied_heads=dict(tied),
        )


def has_unfused_experts(model: nn.Module) -> bool:
    """Whether each expert of ``model`` has linears of its own, which transformers' models hold fused."""
    return any(_OF_EXPERT.search(name) for name, _ in model.named_modules())


_OF_EXPERT = re.compile(r"\.\d+\.(gate|up|down)_proj$")


def _scheme(number: int, data: Any, layers: Mapping[str, Any]) -> LinearDescription:
    try:
        return LinearDescription.from_json(data)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        whose = next((f" of {name}" for name, scheme in layers.items() if scheme == number), "")
        raise ValueError(f"quantization_config is damaged: scheme {number}{whose}: {error}") from error


def _cache(data: Mapping[str, Any]) -> KVFormats:
    kv, listed = from_dict(data.get("kv"), KVSpec | None), data.get("kv_overrides", ())
    rules = from_dict(listed, tuple[KVRule, ...])
    if not isinstance(kv, KVSpec | None):
        raise ValueError(f"quantization_config is damaged: {data['kv']!r:.100} is no format of a cache")
    if not isinstance(rules, tuple) or not all(isinstance(rule, KVRule) for rule in rules):
        raise ValueError(f"quantization_config is damaged: {listed!r:.100} are no formats of some layers' caches")
    for rule in rules:
        check_types(rule)
    return KVFormats(kv, rules)


def _by_value(modules: Mapping[str, Any]) -> list[Any]:
    """``[[value, [names]], ...]``: each value once, with the modules that have it."""
    names: dict[Any, list[str]] = {}
    for name in sorted(modules, key=_natural):
        names.setdefault(modules[name], []).append(name)
    return [[to_dict(value), listed] for value, listed in names.items()]


T = TypeVar("T")


def _of_modules(data: Mapping[str, Any], key: str, kind: type[T]) -> dict[str, T]:
    """What :func:`_by_value` wrote under ``key``, by module; nothing where it is not there."""
    values: dict[str, T] = {}
    listed = data.get(key, ())
    if not isinstance(listed, list | tuple):
        raise ValueError(f"quantization_config is damaged: {key} is a list, found {listed!r:.100}")
    for entry in listed:
        pair = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], list | tuple)
        if not pair or not all(isinstance(name, str) for name in entry[1]):
            raise ValueError(f"quantization_config is damaged: {key} lists [value, [names]], found {entry!r:.100}")
        value = from_dict(entry[0], kind)
        if not isinstance(value, kind):
            raise ValueError(f"quantization_config is damaged: {entry[0]!r:.100} under {key} is no {kind.__name__}")
        values |= dict.fromkeys(entry[1], value)
    return values


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.10`` after ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
