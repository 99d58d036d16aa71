"""What is checked, and said, before the first row: which rows there are, whether texts leak, and what everything will cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from lowbit.checkpoints.source import ModelSource
from lowbit.comparison.rows import Row
from lowbit.data import Bos, Calibration, CalibrationText, calibration_of
from lowbit.evaluation import Leakage, find_leakage
from lowbit.plan import Plan, plan
from lowbit.plan.model_plan import lay_over


def chosen_rows(rows: list[Row], only: tuple[str, ...]) -> list[Row]:
    """The rows with one of ``only`` in their labels; all of them without any."""
    for part in only:
        if not any(part in row.label for row in rows):
            raise ValueError(f"no row has {part!r} in its label; there are {'; '.join(row.label for row in rows)}")
    return [row for row in rows if not only or any(part in row.label for part in only)]


def check_rows(source: ModelSource, rows: list[Row]) -> None:
    """Checks every recipe against the model, without reading a weight."""
    for row in rows:
        try:
            lay_over(source, row.recipe)
        except ValueError as error:
            raise ValueError(f"row {row.label!r}: {error}") from error


def calibrations_for(
    source: ModelSource,
    rows: list[Row],
    text: CalibrationText | None,
    samples: int,
    seq_len: int,
    bos: Bos,
) -> dict[str, Calibration]:
    """What each row that reads text calibrates on, by its label, with the windows that it trains on besides."""
    needy = {row.label: row.recipe.training_windows(seq_len) for row in rows if row.recipe.needs_calibration}
    if needy and text is None:
        raise ValueError(f"{'; '.join(needy)}: calibration text is needed: a file, python-docs, a hub dataset or self")
    made = {
        further: calibration_of(source, text, samples, seq_len, bos, further=further)
        for further in dict.fromkeys(needy.values())
        if text is not None
    }
    return {label: made[further] for label, further in needy.items()}


def check_leakage(
    source: ModelSource,
    calibration: Calibration,
    evaluated: Iterable[Tensor],
    tasks: Sequence[tuple[str, str]],
    allow: bool,
) -> Leakage:
    """Looks for what a row calibrates and trains on in what is evaluated.

    Args:
        calibration: its windows, and those of training text.
        evaluated: the ids of the evaluated windows.
        tasks: names and texts of the tasks.
        allow: whether leaking texts are measured all the same.

    Returns:
        What the evaluated windows have in common with the calibration windows.

    Raises:
        ValueError: a text or a task leaks and ``allow`` is false.
    """
    tokenizer = source.tokenizer_if_any()

    def text_of(ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids.tolist())

    further = () if calibration.further is None else calibration.further
    seen = "\n".join(text_of(ids_T) for ids_T in (*calibration.ids, *further))
    found = find_leakage(seen, "\n".join(text_of(ids_T) for ids_T in evaluated))
    named = [("the evaluated text", found), *((f"task {name}", find_leakage(seen, text)) for name, text in tasks)]
    for name, leakage in named:
        if leakage.leaks and not allow:
            raise ValueError(
                f"the calibration text ({calibration.name}) is in {name}: {leakage}. Methods that read it would look better than they "
                "are; choose another text for one of them, or allow it (--allow-leakage)"
            )
    return found


@dataclass(frozen=True)
class Cost:
    """What ``plan`` foresees for a row: its figures, or why the model cannot have the recipe."""

    row: Row
    plan: Plan | None
    refused: str | None = None


def costs(
    model: str | PathLike[str],
    rows: Iterable[Row],
    *,
    samples: int = 32,
    seq_len: int = 512,
    ram_limit: int = 2**32,
    trust_remote_code: bool = False,
) -> list[Cost]:
    """What every row will give and take, without reading a weight. Arguments as of :func:`lowbit.compare`."""
    found = []
    for row in rows:
        windows = samples if row.recipe.needs_calibration else 0
        try:
            foreseen = plan(
                model,
                row.recipe,
                samples=windows,
                seq_len=seq_len,
                ram_limit=ram_limit,
                trust_remote_code=trust_remote_code,
            )
            found.append(Cost(row, foreseen))
        except ValueError as error:
            found.append(Cost(row, None, str(error)))
    return found


def check_scratch(place: Path) -> Path:
    """The directory for temporary files, made if it is absent."""
    place.mkdir(parents=True, exist_ok=True)
    return place
