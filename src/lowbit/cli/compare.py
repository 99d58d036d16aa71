"""``lowbit compare``: many recipes on one model under one protocol, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbit.cli import common, complete
from lowbit.cli.choose import (
    METHOD_PANEL,
    ActivationBits,
    GroupSize,
    KVSettings,
    Overrides,
    RamLimit,
    SchemeName,
    Settings,
    byte_count,
    cache_recipe,
    method_options,
    override,
    with_settings,
)
from lowbit.cli.table import show_beside, table_rows, tasks_of

if TYPE_CHECKING:
    from lowbit.comparison import Row
    from lowbit.recipes import Recipe

EXAMPLE = (
    "Example: lowbit compare smollm2-135m --method rtn --method gptq --bits 4,3 --group-size 64 "
    "--kv none --kv kivi:2 --calibration python-docs --text python-docs -o results.jsonl. A paper's table: lowbit compare smollm2-135m "
    "--table omniquant-1 --only W4A16 -o omniquant-1.jsonl"
)
INTERRUPTED = "interrupted: finished rows are kept; repeat the same command to measure the others"


def command(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE.jsonl", help="Results; continued where it exists. FILE.md is the table."
        ),
    ],
    grid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A YAML list of rows: label, method or recipe, options.", rich_help_panel=METHOD_PANEL
        ),
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="A row: a recipe file, or a name. May be repeated.",
            autocompletion=complete.recipes,
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Rows: a method, at each of --bits. May be repeated.",
            autocompletion=complete.methods,
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Bits of a weight, one or several.", rich_help_panel=METHOD_PANEL),
    ] = None,
    group_size: GroupSize = None,
    activation_bits: ActivationBits = None,
    scheme: SchemeName = None,
    settings: Settings = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            "--kv",
            metavar="NAME[:BITS]",
            help="Every row once with this method for caches, such as kivi:2, or alone without --method; none: without. May be "
            "repeated.",
            autocompletion=complete.caches,
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    kv_bits: Annotated[
        str | None,
        typer.Option(
            "--kv-bits", metavar="N,N,...", help="Bits of each --kv, one or several.", rich_help_panel=METHOD_PANEL
        ),
    ] = None,
    kv_settings: KVSettings = None,
    overrides: Overrides = None,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The rows of a paper's table beside its published figures: omniquant-1, -2, -3, smoothquant-levels, "
            "smoothquant-alpha, qllm-1, -2, -4, llm-qat, kivi or survey. What they will cost is printed first.",
            autocompletion=complete.tables,
            rich_help_panel=METHOD_PANEL,
        ),
    ] = None,
    known: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Results of an earlier comparison: rows with the same recipe, model, texts and tasks are taken over. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Every row that is random with each of these seeds.", rich_help_panel=METHOD_PANEL
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Measure only rows with this in their label. May be repeated."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help=common.TEXT_HELP.format(more=", or self"))
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a calibration window.")] = 512,
    bos: common.BeginWith = "auto",
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is evaluated on. " + common.TEXT_HELP.format(more=""))
    ] = None,
    protocol: Annotated[str, typer.Option(metavar="NAME", help="As of `lowbit evaluate`.")] = "gptq",
    windows: Annotated[int, typer.Option(min=0, help="Windows evaluated; 0: the whole text.")] = 20,
    eval_seq_len: Annotated[int, typer.Option(min=2, help="Tokens in an evaluated window.")] = 1024,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Zero-shot tasks of --task-files (default: those of --table)."),
    ] = None,
    task_files: Annotated[Path | None, typer.Option(metavar="DIR", help="As of `lowbit evaluate`.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Items of each task.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure tokens per second.")] = False,
    allow_leakage: Annotated[
        bool, typer.Option("--allow-leakage", help="Measure although the calibration text is in what is evaluated.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run rows on a Ray cluster: its address, auto, or local. The scratch directory is shared.",
        ),
    ] = None,
    ram_limit: RamLimit = "4GiB",
    scratch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For temporary files (default: beside the results).")
    ] = None,
    form: Annotated[
        Literal["table", "csv", "latex", "markdown"], typer.Option("--format", help="How stdout shows the table.")
    ] = "table",
    page: common.Page = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Quantize a model by many recipes, measure each result the same way, and write one table.

    Each row runs in a process of its own: quantized packed, read back, and compared with the original on the same text. A
    row that is measured already is not measured again, so the command can be stopped and repeated. A row that fails is
    recorded, the others go on, and the exit code is 1. With --table the rows are those of a paper's table; what `plan` foresees of
    them is printed first.
    """
    limit_of_memory = byte_count(ram_limit)
    if scheme is not None and bits is not None:
        raise typer.BadParameter(f"{scheme} says the bits already; leave out --bits", param_hint="--scheme")
    options = method_options(None, group_size, activation_bits, settings, scheme)
    common.use_threads(threads)
    common.check_page(page)
    import lowbit

    if table is None:
        preset, rows = None, _rows(grid, recipes, methods, bits, options, overrides, _caches(kv, kv_bits, kv_settings))
    else:
        changes = with_settings({}, settings, "--set")
        if grid or recipes or methods or bits or overrides or kv or options.keys() - changes.keys():
            raise typer.BadParameter(
                "a table has its own rows; --only chooses among them, and --set changes options of all that have them",
                param_hint="--table",
            )
        settings_of_plan = {"samples": samples, "seq_len": seq_len, "ram_limit": limit_of_memory}
        preset, rows = table_rows(model, table, changes, only, settings_of_plan, trust_remote_code)
    names = [] if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    names = names or tasks_of(preset, task_files)
    with common.progress() as report:
        records = lowbit.compare(
            model,
            rows,
            common.text_or_default(calibration, "calibration"),
            common.text_or_default(text, "evaluation"),
            out,
            tasks=names,
            task_files=task_files,
            limit=limit,
            known=known or (),
            speed=speed or (preset is not None and preset.speed),
            seeds=[] if seeds is None else [_width(part, "--seeds") for part in seeds.split(",")],
            allow_leakage=allow_leakage,
            ray=ray,
            preset=preset,
            samples=samples,
            seq_len=seq_len,
            bos=bos,
            protocol=protocol,
            eval_seq_len=eval_seq_len,
            windows=windows or None,
            only=only or (),
            threads=threads,
            ram_limit=limit_of_memory,
            scratch=scratch,
            trust_remote_code=trust_remote_code,
            progress=report,
            on_record=lambda record: common.say(_line(record)),
        )
    if as_json:
        common.print_json(records)
    elif form != "table":
        from lowbit.comparison.table import as_table
        from lowbit.tables import FORMS

        found = as_table(records)
        typer.echo(FORMS[form](found if form == "csv" else found.filled()), nl=False)  # programs want all columns
    else:
        _show(model, records)
        if preset is not None:
            show_beside(preset, records)
    common.write_page(page, out)
    failed = [record["label"] for record in records if "error" in record]
    if failed:
        raise ValueError(f"{len(failed)} of {len(records) - 1} rows failed: {'; '.join(failed)}")


def _rows(
    grid: Path | None,
    recipes: list[str] | None,
    methods: list[str] | None,
    bits: str | None,
    options: dict[str, Any],
    overrides: list[str] | None,
    caches: dict[str, Recipe | None],
) -> list[Row]:
    """Rows of the grid file, of recipe files and of methods, in this order; ``overrides`` change all of them.

    ``caches``: each row comes once with each of them; by label, its recipe. Alone they are rows themselves.
    """
    if caches and not (grid or recipes or methods or overrides or bits or options):
        return _rows_of_caches(caches)
    if not (grid or recipes or methods):
        raise typer.BadParameter(
            "give --method NAME, --recipe FILE, --grid FILE or --table NAME", param_hint="--method / --grid"
        )
    if not methods and (bits or options):
        raise typer.BadParameter("--bits and what goes with it are options of --method", param_hint="--method")
    from lowbit.comparison import Row, as_rows, method_rows, read_grid

    widths = [None] if bits is None else [_width(part) for part in bits.split(",")]
    given = [*(read_grid(grid) if grid else []), *(recipes or []), *method_rows(methods or [], widths, options)]
    changes = [override(each) for each in overrides or ()]
    rows = [Row(row.label, row.recipe.with_overrides(changes)) for row in as_rows(given)]
    if not caches:
        return rows
    return as_rows(
        Row(f"{row.label}, {label}" if cache else row.label, row.recipe.with_cache(cache))
        for row in rows
        for label, cache in caches.items()
    )


def _rows_of_caches(caches: dict[str, Recipe | None]) -> list[Row]:
    from lowbit.comparison import Row, as_rows

    return as_rows([Row(label, cache) for label, cache in caches.items() if cache is not None])


def _caches(names: list[str] | None, bits: str | None, settings: list[str] | None) -> dict[str, Recipe | None]:
    """Every ``--kv`` at each of ``--kv-bits``; None: as the model computes it."""
    widths = [None] if bits is None else [_width(part, "--kv-bits") for part in bits.split(",")]
    found = {}
    for name in names or [None]:
        for width in widths if name != "none" else [None]:
            cache = cache_recipe(name, width, None if name == "none" else settings)
            if name is not None:
                found[name if width is None else f"{name}:{width}"] = cache
    return found


def _width(text: str, option: str = "--bits") -> int:
    if not text.strip().isdecimal():
        raise typer.BadParameter(f"expected whole numbers such as 4,3,2, found {text!r}", param_hint=option)
    return int(text)


def _line(record: dict[str, Any]) -> str:
    from lowbit.comparison.table import COLUMNS, cells

    label, *rest = cells(record)
    return f"{label}: " + ", ".join(
        f"{name} {cell}" if name != "remarks" else cell for name, cell in zip(COLUMNS[1:], rest) if cell
    )


_READABLE = 24  # characters of a remark in a line, so that it is not folded into a column of syllables


def _show(model: str, records: list[dict[str, Any]]) -> None:
    from lowbit.comparison.table import COLUMNS, as_table

    found = as_table(records).filled()
    shown = common.table(*found.columns, title=model, numbers=COLUMNS[1:-1])
    for row in found.rows:
        shown.add_row(*row)
    if found.columns[-1] == COLUMNS[-1]:
        shown.columns[-1].min_width = min(_READABLE, max(len(row[-1]) for row in found.rows))
    common.show_table(shown)
