"""Recipe files: the built-in ones, and how any recipe file is read.

A file names a method and its options, or spells out a scheme and stages. Both give a :class:`~lowbit.recipes.Recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lowbit.catalog import builtin_recipes
from lowbit.modules import AttentionSpec, KVSpec
from lowbit.numerics import from_dict, nearest, untagged
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.registry import ALIASES, METHODS, recipe
from lowbit.recipes.stages import Blockwise
from lowbit.scheme import FormatRule, Scheme
from lowbit.steps.precision import Compute

_MOST_BYTES, _MOST_NODES, _DEEPEST = 10**6, 10**5, 50
"""Of a recipe file: its size, its values with aliases written out, and how deep they are nested."""


@untagged
@dataclass(frozen=True)
class MethodFile:
    """A recipe file that names a method (or a mix) and its options.

    Attributes:
        feed, compute, seed: replace the method's own.
        kv: formats of the KV cache, in place of the method's.
        then: stages after the method's own.
        overrides: see :class:`~lowbit.scheme.Override`.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[dict[str, Any], ...] = ()
    description: str = ""
    feed: Literal["fp", "quant"] | None = None
    compute: Compute | None = None
    seed: int | None = None
    kv: KVSpec | None = None
    then: tuple[Any, ...] = ()

    def recipe(self) -> Recipe:
        built = recipe(self.method, **self.options)
        given = {"feed": self.feed, "compute": self.compute}
        built = built.with_blockwise(**{name: value for name, value in given.items() if value is not None})
        fits = built.cache_stages if self.kv is None else ()
        return replace(
            built,
            scheme=built.scheme if self.kv is None else replace(built.scheme, kv=self.kv),
            stages=(*(stage for stage in built.stages if not stage.of_cache), *self.then, *fits),
            seed=built.seed if self.seed is None else self.seed,
        ).with_overrides(self.overrides)


@untagged
@dataclass(frozen=True)
class RecipeFile:
    """A recipe file that spells out scheme and stages.

    Scheme and stages are written as by :func:`lowbit.numerics.to_dict`, or in short form.

    Attributes:
        scheme: a mapping of ``rules``, ``attention`` and ``kv``, or the rules alone, with ``attention`` and ``kv`` at
            the top.
        stages: in order. ``steps``, ``feed`` and ``compute`` at the top stand for one Blockwise stage.
        overrides: see :class:`~lowbit.scheme.Override`.
    """

    name: str
    scheme: Scheme | tuple[FormatRule, ...] = ()
    attention: AttentionSpec | None = None
    kv: KVSpec | None = None
    stages: tuple[Any, ...] | None = None
    steps: tuple[Any, ...] | None = None
    feed: Literal["fp", "quant"] | None = None
    compute: Compute | None = None
    seed: int = 0
    overrides: tuple[dict[str, Any], ...] = ()
    description: str = ""

    def __post_init__(self):
        if isinstance(self.scheme, Scheme) and (self.attention or self.kv):
            raise ValueError("'scheme' is a mapping, so attention and kv go into it; found them at the top")
        if self.stages is not None and not self.steps is self.feed is self.compute is None:
            raise ValueError(
                "steps, feed and compute at the top are short for one Blockwise stage; with 'stages' they go into it"
            )

    def recipe(self) -> Recipe:
        stages = self.stages or ()
        if self.steps is not None:
            stages = (Blockwise(self.steps, self.feed or "quant", self.compute or "auto"),)
        scheme = self.scheme if isinstance(self.scheme, Scheme) else Scheme(self.scheme, self.attention, self.kv)
        return Recipe(self.name, scheme, stages, self.seed).with_overrides(self.overrides)


def from_plain(data: Any) -> Recipe:
    """A recipe from the data of a file: a :class:`MethodFile` if it names a ``method``, else a :class:`RecipeFile`.

    Raises:
        ValueError: an unknown key, type or option, with the nearest known one; an impossible combination.
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"a recipe is a mapping with 'method' or with 'scheme' and 'stages', found {type(data).__name__}"
        )
    spelled_out = "method" not in data and data.keys() & {"name", "scheme", "stages", "steps"}
    return from_dict(data, RecipeFile if spelled_out else MethodFile).recipe()


class Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number (YAML 1.1 asks for ``1.0e-3``).

    A key given twice is an error. So is a file whose aliases refer to what contains them, or multiply its content.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, 0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in written:
            if written.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r:.100} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """Nodes of ``node`` with every alias written out; raises for what no recipe is."""
    if node in known:
        if not known[node]:
            raise yaml.constructor.ConstructorError(None, None, "an alias refers to what contains it", node.start_mark)
        return known[node]
    if depth > _DEEPEST:
        raise yaml.constructor.ConstructorError(None, None, f"nested more than {_DEEPEST} deep", node.start_mark)
    known[node] = 0  # while its content is counted
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        inside = [each for pair in node.value for each in pair]
    known[node] = 1 + sum(_count(each, known, depth + 1) for each in inside)
    if known[node] > _MOST_NODES:
        raise yaml.constructor.ConstructorError(
            None, None, f"with its aliases written out it has more than {_MOST_NODES} values", node.start_mark
        )
    return known[node]


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def from_file(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        ValueError: the file is missing, is not YAML, or does not hold a recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe file {str(path)!r}; `lowbit recipes` lists the ones that come along")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, a recipe has at most {_MOST_BYTES}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a recipe") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {said:.300}") from error
    try:
        return from_plain(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def as_recipe(value: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a recipe, a method's name (or a mix), a built-in recipe's name, a file or plain data.

    Raises:
        ValueError: as :func:`from_plain`, :func:`from_file` and :func:`recipe`.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Mapping):
        return from_plain(dict(value))
    if str(value).endswith((".yaml", ".yml")):
        return from_file(value)
    if str(value) in builtin_recipes():
        return from_file(builtin_recipes()[str(value)])
    name, methods = str(value), [*METHODS, *ALIASES]
    if "+" not in name and name not in methods:
        raise ValueError(
            f"no method and no recipe {name!r:.200}{nearest(name[:200], [*methods, *builtin_recipes()])}; `lowbit methods` and "
            "`lowbit recipes` list them, and the name of a recipe file ends in .yaml"
        )
    return recipe(name)
