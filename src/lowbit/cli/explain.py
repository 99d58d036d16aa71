"""``lowbit explain``: what a recipe would do to each layer of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import common, complete
from lowbit.cli.beside_format import check_format
from lowbit.cli.choose import (
    KV,
    ActivationBits,
    Bits,
    FormatName,
    GroupSize,
    KVBits,
    KVSettings,
    Overrides,
    SchemeName,
    Settings,
    choose_recipe,
    method_options,
)

EXAMPLE = "Example: lowbit explain smoothquant+gptq smollm2-135m --activation-bits 8 --override down:bits=8"


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, a recipe's name, a method's name, or a mix.",
            autocompletion=complete.recipes_and_methods,
        ),
    ],
    model: common.Model,
    bits: Bits = None,
    group_size: GroupSize = None,
    activation_bits: ActivationBits = None,
    scheme: SchemeName = None,
    settings: Settings = None,
    overrides: Overrides = None,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    format: FormatName = "native",
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Explain step by step what a recipe does, and the format it gives to each layer. Reads no weight.

    Options of a method (--bits and so on) go with a method's name.
    """
    options = method_options(bits, group_size, activation_bits, settings, scheme)
    by_method = bool(options) or (kv is None and (kv_bits is not None or kv_settings is not None))
    method, file = (recipe, None) if by_method else (None, recipe)
    check_format(format, method, options, settings, overrides, scheme=scheme)
    chosen = choose_recipe(method, file, options, overrides, (kv, kv_bits, kv_settings))
    from lowbit.plan import explain

    result = explain(chosen, model, format=format, trust_remote_code=trust_remote_code)
    if as_json:
        common.print_json(result.to_dict())
        return
    console = common.console()
    for count, step in enumerate(result.steps, start=1):
        console.print(f"{count}. {step}", markup=False, soft_wrap=True)
    common.show_layers(result.layers)
    common.warn(result.notes, "note")
