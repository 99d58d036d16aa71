"""``lowbit compare --table``: what the rows of a paper's table cost, and the published figures beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli import common

if TYPE_CHECKING:
    from lowbit.comparison import Preset, Row


def table_rows(
    model: str,
    name: str,
    changes: dict[str, Any],
    only: list[str] | None,
    settings: dict[str, Any],
    trust_remote_code: bool,
) -> tuple[Preset, list[Row]]:
    """The table, and those of its rows that the model can have; prints on stderr what ``plan`` foresees of them.

    Args:
        changes: options of rows whose method has them, in place of the table's.
        only: parts of labels; other rows are left out of the forecast.
        settings: ``samples``, ``seq_len`` and ``ram_limit``, as of :func:`lowbit.compare`.
    """
    from lowbit.comparison import costs, read_preset

    preset = read_preset(name, changes)
    wanted = [row for row in preset.rows if not only or any(part in row.label for part in only)]
    if not wanted:
        raise ValueError(f"no row of table {name} has {' or '.join(only or [])} in its label")
    found = costs(model, wanted, trust_remote_code=trust_remote_code, **settings)
    common.say(f"{preset.title} ({preset.paper})")
    for cost in found:
        if cost.plan is None:
            common.warn([f"{cost.row.label}: left out, because this model cannot have it: {cost.refused}"])
            continue
        common.say(
            f"  {cost.row.label}: {cost.plan.model_bits_per_weight:.2f} bits a weight, {common.size(cost.plan.bytes_out)}, about "
            f"{common.size(cost.plan.peak_ram_bytes)} of memory"
            + (f", {common.size(cost.plan.peak_disk_bytes)} of temporary files" if cost.plan.peak_disk_bytes else "")
        )
    plans = [cost.plan for cost in found if cost.plan is not None]
    if not plans:
        raise ValueError(f"no row of table {name} is possible for this model")
    calibrated = sum(cost.plan is not None and cost.row.recipe.needs_calibration for cost in found)
    learned = sum(cost.plan is not None and cost.row.recipe.learns for cost in found)
    common.say(
        f"{len(plans)} rows, {calibrated} with calibration text, {learned} of these learn, which takes longest; at most "
        f"{common.size(max(plan.peak_ram_bytes for plan in plans))} of memory and "
        f"{common.size(max(plan.bytes_out + plan.peak_disk_bytes for plan in plans))} of disk at a time"
    )
    return preset, [cost.row for cost in found if cost.plan is not None]


def tasks_of(preset: Preset | None, files: Path | None) -> list[str]:
    """The tasks of the table, where there are files for them; without, a warning says what is left out."""
    if preset is None or not preset.tasks:
        return []
    if files is None:
        common.warn([f"the table reports {', '.join(preset.tasks)}: give --task-files DIR to measure them; left out"])
        return []
    return list(preset.tasks)


def show_beside(preset: Preset, records: list[dict[str, Any]]) -> None:
    """Our figures and the paper's."""
    beside = preset.beside(records)
    title = f"{preset.title}; published: on other models"
    table = common.table(*beside.columns, title=title, numbers=beside.columns[1:])
    for row in beside.rows:
        table.add_row(*row)
    common.show_table(table)
    common.console().print(f"published: {preset.paper}. {preset.note}", markup=False)
