"""``lowbit allocate``: a recipe in, the same recipe with a width for every layer out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import common
from lowbit.cli.choose import (
    KV,
    ActivationBits,
    Bits,
    GroupSize,
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
)

EXAMPLE = (
    "Example: lowbit allocate smollm2-135m --method gptq --group-size channel --target-bits 3.3 --calibration python-docs "
    "-o mixed.yaml, then lowbit quantize smollm2-135m --recipe mixed.yaml -o smollm2-mixed"
)
INTERRUPTED = "interrupted: nothing was written"


def command(
    model: common.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.yaml", help="The recipe that comes out; must be new.")
    ],
    target_bits: Annotated[
        float, typer.Option(metavar="X", help="Bits a weight on average, scales and everything else stored counted.")
    ],
    method: MethodOption = None,
    recipe: RecipeOption = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    activation_bits: ActivationBits = None,
    scheme: SchemeName = None,
    settings: Settings = None,
    overrides: Overrides = None,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=", or self"))
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bos: common.BeginWith = "auto",
    ram_limit: RamLimit = "4GiB",
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Give every layer the width that its sensitivity asks for, so that the model takes so many bits a weight.

    Sensitivity is Fisher information from one backward pass over the model, a block in memory at a time. What comes out is
    an ordinary recipe file, to read, to change and to quantize with. --bits is only what the result is compared with.
    """
    from lowbit.checkpoints.target import check_new_file

    check_new_file(out, (".yaml", ".yml"), "a recipe file")
    limit = byte_count(ram_limit)
    chosen = choose_recipe(
        method,
        recipe,
        method_options(bits, group_size, activation_bits, settings, scheme),
        overrides,
        (kv, kv_bits, kv_settings),
    )
    common.use_threads(threads)
    import yaml

    import lowbit

    text = common.text_or_default(calibration, "calibration")
    with common.progress() as report:
        allocation = lowbit.allocate(
            model,
            chosen,
            target_bits,
            text,
            samples=samples,
            seq_len=seq_len,
            bos=bos,
            ram_limit=limit,
            trust_remote_code=trust_remote_code,
            progress=report,
        )
    common.warn(allocation.warnings)
    from lowbit.whole_file import write_whole_text

    data = allocation.to_dict()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole_text(out, yaml.safe_dump(data, sort_keys=False, width=2**16, default_flow_style=None))
    if as_json:
        common.print_json({**data, "bits_per_weight": allocation.bits_per_weight, "out": str(out)})
        return
    table = common.table(
        "bits of a code", "layers", "kinds", title=f"{allocation.base.name} -> {out}", numbers=("layers",)
    )
    for width, names in allocation.by_width().items():
        table.add_row(str(width), str(len(names)), ", ".join(sorted({name.rpartition(".")[2] for name in names})))
    common.show_table(table)
    common.say(f"{data['description']}")
