"""From the options that say what to do to a recipe: ``--method`` with its options, or ``--recipe``, and ``--override``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbit.cli.complete import caches, methods, recipes

if TYPE_CHECKING:
    from lowbit.modules import KVFormats
    from lowbit.recipes import Recipe

METHOD_PANEL = "What to do"
_PER_CHANNEL = ("channel", "none", "-1")
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FEW_BYTES = 10**6
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

MethodOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A method (see `lowbit methods`), or a mix such as smoothquant+gptq.",
        autocompletion=methods,
        rich_help_panel=METHOD_PANEL,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A recipe file, or a name from `lowbit recipes`.",
        autocompletion=recipes,
        rich_help_panel=METHOD_PANEL,
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits of a weight.", rich_help_panel=METHOD_PANEL)]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        metavar="WnAm",
        help="Bits of weights and inputs in one word, such as W4A16 or W8A8: --bits and --activation-bits.",
        rich_help_panel=METHOD_PANEL,
    ),
]
GroupSize = Annotated[
    str | None,
    typer.Option(
        metavar="N|channel",
        help="Weights that share a scale; channel (or -1): one scale for each output channel.",
        rich_help_panel=METHOD_PANEL,
    ),
]
ActivationBits = Annotated[
    int | None, typer.Option(help="Bits of each linear's input (16: not quantized).", rich_help_panel=METHOD_PANEL)
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of the token embedding (16: as it is). Default: 8 where weights have 4 or fewer and it costs little.",
        rich_help_panel=METHOD_PANEL,
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(help="Bits of the output head, as --embedding-bits.", rich_help_panel=METHOD_PANEL),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the method, the value as in YAML. May be repeated.",
        rich_help_panel=METHOD_PANEL,
    ),
]
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="NAME[:BITS]",
        help="How keys and values are cached: a method for caches and its bits, such as kivi:2; none: as the model computes them.",
        autocompletion=caches,
        rich_help_panel=METHOD_PANEL,
    ),
]
KVBits = Annotated[
    int | None, typer.Option("--kv-bits", metavar="N", help="Bits of keys and values.", rich_help_panel=METHOD_PANEL)
]
KVSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-set",
        metavar="KEY=VALUE",
        help="Another option of the method for caches. May be repeated.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="MATCH:KEY=VALUE,...",
        help="Another format for some layers: MATCH is a role (down), a name pattern or re:REGEX; keys are bits, "
        "group_size, symmetric, activation_bits; MATCH:skip leaves them as they are. May be repeated.",
        rich_help_panel=METHOD_PANEL,
    ),
]

KeepDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Store tensors that are not quantized in at most this type; auto: each in its own."),
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="The file format of the result, such as gguf; gguf:q4_k_m says the bits of each matrix too.",
    ),
]
RamLimit = Annotated[
    str, typer.Option(metavar="SIZE", help="Activations beyond this go to memory-mapped files, such as 500MB.")
]


def method_options(
    bits: int | None,
    group_size: str | None,
    activation_bits: int | None,
    settings: Sequence[str] | None,
    scheme: str | None = None,
) -> dict[str, Any]:
    """The options that the user gave, and no others: a method's defaults are its own, and so are its refusals."""
    if scheme is not None:
        if bits is not None or activation_bits is not None:
            raise typer.BadParameter(
                f"{scheme} says the bits already; leave out --bits and --activation-bits", param_hint="--scheme"
            )
        bits, activation_bits = scheme_bits(scheme)
    given: dict[str, Any] = {"bits": bits, "activation_bits": activation_bits}
    options = {key: value for key, value in given.items() if value is not None}
    if group_size is not None:
        options["group_size"] = None if group_size.lower() in _PER_CHANNEL else _scalar(group_size)
        if type(options["group_size"]) not in (int, type(None)):
            raise typer.BadParameter(
                f"expected a number of weights, or channel; found {group_size!r}", param_hint="--group-size"
            )
    return with_settings(options, settings, "--set")


def with_settings(options: dict[str, Any], settings: Sequence[str] | None, hint: str) -> dict[str, Any]:
    """``options`` and those of ``KEY=VALUE`` settings, whose values are read as YAML; ``hint`` names them in errors."""
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"expected KEY=VALUE, found {setting!r}", param_hint=hint)
        if key in options:
            raise typer.BadParameter(f"{key} is given twice", param_hint=hint)
        options[key] = _scalar(value)
    return options


def cache_options(bits: int | None, settings: Sequence[str] | None) -> dict[str, Any]:
    """``--kv-bits`` and ``--kv-set`` as options of a method for caches."""
    return with_settings({} if bits is None else {"bits": bits}, settings, "--kv-set")


def choose_cache(name: str | None, bits: int | None, settings: Sequence[str] | None) -> KVFormats | None:
    """The formats that ``--kv`` and its options ask for; none quantized for ``none``; None where it is not given.

    Raises:
        ValueError: what the method refuses.
        typer.BadParameter: options without a method.
    """
    chosen = cache_recipe(name, bits, settings)
    if name is None:
        return None
    from lowbit.modules import KVFormats

    return KVFormats() if chosen is None else chosen.scheme.cache


def cache_recipe(name: str | None, bits: int | None, settings: Sequence[str] | None) -> Recipe | None:
    """The recipe of the cache that ``--kv`` and its options ask for; None for ``none``. Raises as :func:`choose_cache`."""
    options = cache_options(bits, settings)
    if name is None or name == "none":
        if options:
            raise typer.BadParameter(
                f"{', '.join(options)} of which method? Give --kv NAME", param_hint="--kv-bits / --kv-set"
            )
        return None
    from lowbit.recipes import kv_recipe

    return kv_recipe(name, **options)


def scheme_bits(scheme: str) -> tuple[int, int]:
    """Bits of weights and of inputs: 4 and 16 for ``W4A16``."""
    match = re.fullmatch(r"w(\d+)a(\d+)", scheme.lower())
    if match is None:
        raise typer.BadParameter(
            f"expected W and bits of a weight, A and bits of an input, such as W4A16; found {scheme!r}",
            param_hint="--scheme",
        )
    return int(match[1]), int(match[2])


def choose_recipe(
    method: str | None,
    file: str | None,
    options: Mapping[str, Any],
    overrides: Sequence[str] | None,
    cache: tuple[str | None, int | None, Sequence[str] | None] = (None, None, None),
) -> Any:
    """The :class:`lowbit.recipes.Recipe` that the options ask for.

    ``cache``: ``--kv``, which takes the place of the recipe's own cache or is a recipe itself, and its options. Without it
    these are of the method for caches in ``--method``.

    Raises:
        ValueError: whatever the recipe refuses.
        typer.BadParameter: neither or both of method and file, or a file with options.
    """
    from lowbit.recipes import as_recipe, recipe

    name, bits, settings = cache
    if name is not None:
        held = cache_recipe(name, bits, settings)
        if method is None and file is None and held is not None:
            if options or overrides:
                raise typer.BadParameter("--kv alone leaves weights as they are; add --method NAME", param_hint="--kv")
            return held
        return choose_recipe(method, file, options, overrides).with_cache(held)
    options = {**options, **{f"kv_{key}": value for key, value in cache_options(bits, settings).items()}}
    changes = [override(text) for text in overrides or ()]
    if file is not None and options:
        raise typer.BadParameter(
            f"a recipe file has its own options; found {', '.join(options)} (change layers with --override)",
            param_hint="--recipe",
        )
    if method is not None and file is None:
        return recipe(method, **options).with_overrides(changes)
    if file is not None and method is None:
        return as_recipe(file).with_overrides(changes)
    raise typer.BadParameter("give --method NAME or --recipe FILE, one of them", param_hint="--method / --recipe")


def outside_overrides(embedding_bits: int | None, head_bits: int | None) -> list[str]:
    """``--embedding-bits`` and ``--head-bits`` as overrides."""
    given = {"embedding": embedding_bits, "head": head_bits}
    return [
        f"{match}:skip" if bits >= 16 else f"{match}:bits={bits}" for match, bits in given.items() if bits is not None
    ]


def override(text: str) -> dict[str, Any]:
    """``MATCH:key=value,key=value`` or ``MATCH:skip`` as an entry of a recipe file's ``overrides``."""
    match, colon, changes = text.rpartition(":")
    if match and changes == "skip":
        return {"match": match, "skip": True}
    pairs = [change.partition("=") for change in changes.split(",")]
    if not match or not colon or not all(key and equals and value for key, equals, value in pairs):
        raise typer.BadParameter(
            f"expected MATCH:key=value[,key=value] or MATCH:skip, found {text!r}", param_hint="--override"
        )
    entry: dict[str, Any] = {"match": match} | {key: _scalar(value) for key, _, value in pairs}
    if "group_size" in entry and str(entry["group_size"]).lower() in _PER_CHANNEL:
        entry["group_size"] = "channel"
    return entry


def byte_count(text: str) -> int:
    """``4GB`` (10^9), ``4GiB`` (2^30), ``512MB`` or plain bytes, of which a few are refused: 4 is meant as 4GB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise typer.BadParameter(f"expected a size such as 4GB or 512MiB, found {text!r}")
    if match[2] is None and 0 < float(match[1]) < _FEW_BYTES:
        raise typer.BadParameter(f"expected a size such as 4GB or 512MiB, found {text!r}, which would be bytes")
    return int(float(match[1]) * (_UNITS | _BINARY)[match[2] or ""])


def _scalar(text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # no YAML: then it is text, and the recipe says what it thinks of it
    return text if isinstance(value, dict | list) else value
