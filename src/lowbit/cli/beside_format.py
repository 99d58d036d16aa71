"""What may stand beside ``--format``: options that a format's own numbers would replace are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer


def check_format(
    format: str,
    method: str | None,
    options: Mapping[str, Any],
    settings: Sequence[str] | None,
    overrides: Sequence[str] | None,
    *,
    scheme: str | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
) -> None:
    """Refuses options of weights' number formats and overrides beside a ``--format`` that gives every matrix its numbers: the
    format's would replace them without a word.

    Args:
        options: of the method, as ``method_options`` makes them of what was typed.
        settings, overrides, scheme, embedding_bits, head_bits: what was typed, which the message repeats.
    """
    if ":" not in format:
        return
    from lowbit.checkpoints.formats import find_format

    if not find_format(format).says_numbers:
        return
    typed = {setting.partition("=")[0]: f"--set {setting}" for setting in settings or ()}
    if scheme is not None:
        typed["bits"] = f"--scheme {scheme}"
    given = [
        typed.get(key, f"--{key.replace('_', '-')} {'channel' if value is None else value}")
        for key, value in options.items()
        if key in ("bits", "group_size") or _says_numbers_alone(method, options, key)
    ]
    given += [f"--override {change}" for change in overrides or ()]
    outside = {"--embedding-bits": embedding_bits, "--head-bits": head_bits}
    given += [f"{name} {value}" for name, value in outside.items() if value is not None]
    if given:
        raise typer.BadParameter(
            f"{format} gives every matrix its bits and groups; leave out {', '.join(given)}, or name the format without an option",
            param_hint="--format",
        )


def _says_numbers_alone(method: str | None, options: Mapping[str, Any], key: str) -> bool:
    """Whether an option changes how the method's weights are stored, and nothing else of its recipe."""
    from lowbit.recipes import recipe

    if method is None:
        return False
    try:
        made = [recipe(method, **each) for each in (options, {name: options[name] for name in options if name != key})]
    except ValueError:
        return False  # choose_recipe says what is wrong
    (stages, weights), (others, usual) = ((each.stages, [rule.weight for rule in each.scheme.rules]) for each in made)
    return stages == others and weights != usual
