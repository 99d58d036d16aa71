"""``lowbit plan``: what a run would give and cost, from config and headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import common
from lowbit.cli.beside_format import check_format
from lowbit.cli.choose import (
    KV,
    ActivationBits,
    Bits,
    EmbeddingBits,
    FormatName,
    GroupSize,
    HeadBits,
    KeepDtype,
    KVBits,
    KVSettings,
    MethodOption,
    Overrides,
    RamLimit,
    RecipeOption,
    SchemeName,
    Settings,
    byte_count,
    choose_recipe,
    method_options,
    outside_overrides,
)

if TYPE_CHECKING:
    from lowbit.plan import Plan

EXAMPLE = "Example: lowbit plan smollm2-135m --method gptq --bits 4 --group-size 64 --kv kivi:2 --context 8192"


def command(
    model: common.Model,
    method: MethodOption = None,
    recipe: RecipeOption = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    activation_bits: ActivationBits = None,
    embedding_bits: EmbeddingBits = None,
    head_bits: HeadBits = None,
    scheme: SchemeName = None,
    settings: Settings = None,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Windows of calibration text; 0: a run without text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of a sequence whose cache is counted (default: the model's most)."
        ),
    ] = None,
    ram_limit: RamLimit = "4GiB",
    keep_dtype: KeepDtype = "auto",
    format: FormatName = "native",
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Say what quantizing would give and need, without reading a weight.

    Bytes, bits per weight, peak memory, layers that stay as they are and why, and which runtimes can take the result.
    """
    options = method_options(bits, group_size, activation_bits, settings, scheme)
    changes = [*(overrides or ()), *outside_overrides(embedding_bits, head_bits)]
    outside = {"embedding_bits": embedding_bits, "head_bits": head_bits}
    check_format(format, method, options, settings, overrides, scheme=scheme, **outside)
    chosen = choose_recipe(method, recipe, options, changes, (kv, kv_bits, kv_settings))
    from lowbit.plan import plan

    result = plan(
        model,
        chosen,
        samples=samples,
        seq_len=seq_len,
        context=context,
        ram_limit=byte_count(ram_limit),
        keep_dtype=keep_dtype,
        format=format,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        common.print_json(result.to_dict())
    else:
        _show(result)


def _show(result: Plan) -> None:
    title = f"{result.recipe['name']} on {result.name} (architecture {result.architecture})"
    table = common.table("plan", "", title=title, numbers=("",))
    quantized = [row for row in result.layers if not row.reason]
    table.add_row("matrices quantized", f"{len(quantized)} of {len(result.layers)}")
    table.add_row("bits per weight, quantized linears", f"{result.bits_per_weight:.4f}")
    table.add_row("bits per weight, whole model", f"{result.model_bits_per_weight:.4f}")
    table.add_row("tensors now", common.size(result.bytes_in))
    table.add_row("tensors after", common.size(result.bytes_out))
    table.add_row("peak memory while quantizing, about", common.size(result.peak_ram_bytes))
    if result.cache is not None:
        before, after = result.cache.bytes_floating, result.cache.bytes
        text = common.size(after) if after == before else f"{common.size(after)} of {common.size(before)}"
        table.add_row(f"cache of a sequence of {result.cache.tokens} tokens", text)
    if result.peak_disk_bytes:
        table.add_row("temporary files beside the target", common.size(result.peak_disk_bytes))
    common.show_table(table)
    common.show_layers(result.layers)
    runs = common.table("runs in", "")
    for name, verdict in result.compatibility.items():
        runs.add_row(name, verdict)
    common.show_table(runs)
    common.warn(result.warnings)
