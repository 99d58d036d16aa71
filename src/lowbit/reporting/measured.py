"""What was measured and comes with the package: rows of ``benchmarks/results`` that one command repeats.

``make docs`` writes ``measured.json``; a test checks that it says what the results say. A row is in it if its recipe is what its
command gives today.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lowbit.recipes import Recipe, Train, as_recipe, recipe
from lowbit.scheme import FormatRule

FILE = Path(__file__).parent / "measured.json"
_OPTIONS = {"bits": "--bits", "activation_bits": "--activation-bits", "group_size": "--group-size"}


@dataclass(frozen=True)
class MeasuredRow:
    """A way to quantize, and what it cost the model that it was measured on.

    Attributes:
        label: its name in the table.
        table: the file of the table.
        method, options: how it is asked for; or
        recipe_name: a recipe that comes with the package.
        bits: stored bits a weight of the quantized linears.
        perplexity, original: the result's and the original's, on the same text.
        loss: logarithm of the ratio of the two, nats a token.
        kl: from the original, nats a token; None: not measured.
        time: of its method, over that of GPTQ on one layer; None: not measured.
    """

    label: str
    table: str
    bits: float
    perplexity: float
    original: float
    loss: float
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe_name: str | None = None
    kl: float | None = None
    time: float | None = None

    @cached_property
    def recipe(self) -> Recipe:
        """What was measured."""
        return as_recipe(str(self.recipe_name)) if self.method is None else recipe(self.method, **self.options)

    @property
    def asked(self) -> int:
        """Bits of a code."""
        return min(rule.weight.grid.bits for rule in self._rules if rule.weight is not None)

    @property
    def quantizes_inputs(self) -> bool:
        return any(rule.activation is not None for rule in self._rules)

    @property
    def trains(self) -> bool:
        """Whether the whole model is trained, which takes its memory and much time."""
        return any(isinstance(stage, Train) for stage in self.recipe.stages)

    @property
    def _rules(self) -> tuple[FormatRule, ...]:
        return self.recipe.scheme.rules

    def words(self, *, formats: bool = True) -> list[str]:
        """The words of a command that ask for it; without ``formats`` those that a file format decides are left out."""
        if self.method is None:
            return ["--recipe", str(self.recipe_name)]
        words = ["--method", self.method]
        for key, value in self.options.items():
            if not formats and key in _OPTIONS:
                continue
            text = "channel" if key == "group_size" and value is None else json.dumps(value).strip('"')
            words += [_OPTIONS[key], text] if key in _OPTIONS else ["--set", f"{key}={text}"]
        return words

    def in_format(self, file_format: str) -> Recipe:
        """The recipe that :meth:`words` ask for where ``file_format`` decides the formats."""
        if ":" not in file_format or self.method is None:
            return self.recipe
        return recipe(self.method, **{key: value for key, value in self.options.items() if key not in _OPTIONS})


@dataclass(frozen=True)
class MeasuredCache:
    """A way to hold keys and values, ``--kv name``, and its cost as of :class:`MeasuredRow`."""

    name: str
    table: str
    bits: float
    loss: float
    kl: float


@dataclass(frozen=True)
class Measured:
    """Everything that recommendations stand on.

    Attributes:
        model, text: what was measured, and on what.
        rows: by table and place.
        caches: of keys and values.
        beside: bytes of memory that a running model took beside its weights, least and most; of ``beside_table``.
    """

    model: str
    text: str
    rows: tuple[MeasuredRow, ...]
    caches: tuple[MeasuredCache, ...]
    beside: tuple[int, int]
    beside_table: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        rows = tuple(MeasuredRow(**row) for row in data["rows"])
        caches = tuple(MeasuredCache(**row) for row in data["caches"])
        return cls(data["model"], data["text"], rows, caches, tuple(data["beside"]), data["beside_table"])


@cache
def measured() -> Measured:
    """The data of the package."""
    return Measured.from_dict(json.loads(FILE.read_text(encoding="utf-8")))


def quantize_words(row: MeasuredRow, model: str, file_format: str, kv: str | None) -> str:
    """The command that repeats ``row`` on ``model``."""
    words = ["lowbit", "quantize", model, *row.words(formats=":" not in file_format)]
    words += [] if file_format == "native" else ["--format", file_format]
    words += [] if kv is None else ["--kv", kv]
    words += ["--calibration", "TEXT"] if row.recipe.needs_calibration else []
    return shlex.join([*words, "-o", "DIR"])
