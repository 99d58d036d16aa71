"""What the commands share: where output goes, how errors end, the progress bar, and options that several have."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbit.progress import Progress as Report
from lowbit.progress import silent

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import Console
    from rich.table import Table

    from lowbit.stages.journal import Journal

LOG_WIDTH = 160  # columns of a table that goes to a file or a pipe
LOG_SECONDS = 10  # between progress lines where there is no terminal to draw a bar on

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local directory, a hub id, a .gguf file, or smollm2-135m.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads of torch (default: torch's own choice).")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
Page = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write one page with figures, as `lowbit report` does."),
]
TEXT_HELP = (
    "A text file, rows (.jsonl, .json, .csv, .parquet with a column text or messages, or FILE:COLUMN), python-docs, a hub "
    "dataset (wikitext2, or name:config:split:column){more} (default: wikitext2 where a hub answers, else python-docs)."
)
BeginWith = Annotated[
    Literal["auto", "yes", "no"],
    typer.Option("--bos", help="Begin every calibration window with BOS; auto: as the model's tokenizer does."),
]


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.", show_default=False)
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Print messages of the libraries too, and tracebacks of errors.", show_default=False
    ),
]


# Output


_quiet = _verbose = False


def set_output(quiet: bool, verbose: bool) -> None:
    """How much this process prints from now on."""
    global _quiet, _verbose
    if quiet and verbose:
        raise typer.BadParameter("found both --quiet and --verbose; give one of them")
    _quiet, _verbose = quiet, verbose


def is_verbose() -> bool:
    """Whether libraries may print."""
    return _verbose


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; wide where nobody looks, because a file does not wrap."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else LOG_WIDTH, highlight=False)


def say(message: str) -> None:
    """A line for the person who waits, on stderr."""
    if not _quiet:
        typer.echo(message, err=True)


def say_found(journal: Journal, further: str = "") -> None:
    """Says what becomes of an unfinished run that an open journal has found."""
    if journal.found is not None:
        say(f"{journal.found} the unfinished run in {journal.directory}{further}")


def fail(message: str) -> None:
    """The line that says what is wrong, on stderr."""
    typer.echo("error: " + " ".join(message.split("\n")), err=True)


def _after_full_disk(error: ValueError | OSError) -> str:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    where = "there" if error.filename else "where the command writes and keeps temporary files"
    return f": make room {where}, and repeat the same command"


def warn(messages: Iterable[str], kind: str = "warning") -> None:
    """Each message as a line on stderr."""
    from rich.text import Text

    for message in messages:
        console(stderr=True).print(Text.assemble((f"{kind}: ", "yellow"), message), soft_wrap=True)


@contextmanager
def _lines_of_warnings() -> Iterator[None]:
    """While open, the Python warnings of this package are lines on stderr, each once."""
    said: set[str] = set()
    package = str(Path(__file__).parents[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"lowbit(\.|$)")
        usual = warnings.showwarning

        def show(message: Warning | str, kind: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
            if not filename.startswith(package):
                usual(message, kind, filename, *rest, **more)
            elif str(message) not in said:
                said.add(str(message))
                warn([str(message)])

        warnings.showwarning = show
        yield


def print_json(value: Any) -> None:
    """``value`` on stdout as strict JSON: what is NaN or infinite becomes null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(*columns: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table for :func:`show_table`; columns in ``numbers`` are aligned to the right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        whole = not made.columns or name in numbers  # names are for copying, and half a number is another number
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold", no_wrap=whole)
    return made


def show_table(made: Table) -> None:
    """Prints a table on stdout; where it is too wide for the terminal, each row as a paragraph."""
    from rich.measure import Measurement

    screen = console()
    unlimited = screen.options.update(width=2**16, markup=False)  # a measure never exceeds the width that it is told
    if Measurement.get(screen, unlimited, made).minimum <= screen.width:
        screen.print(made, markup=False)
        return
    if made.title:
        screen.print(made.title, style="bold", markup=False)
    names = [str(column.header) for column in made.columns]
    for first, *rest in zip(*(column.cells for column in made.columns), strict=True):
        screen.print(first, markup=False, soft_wrap=True)
        line = "   "
        for name, cell in zip(names[1:], rest, strict=True):
            if cell in ("", "-"):
                continue
            item = f" {name}: {cell};" if name else f" {cell};"
            if len(line) + len(item) > screen.width and line.strip():
                screen.print(line, markup=False, soft_wrap=True)
                line = "   "
            line += item
        screen.print(line.removesuffix(";"), markup=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for reading: ``98.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for reading: ``1 min 10 s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def number(value: float | None, form: str = ".4g") -> str:
    """A figure for reading; ``-`` where it was not measured."""
    return "-" if value is None else format(value, form)


def show_layers(rows: Iterable[Any]) -> None:
    """A table of a plan's rows, layers that differ only in their block's number as one row."""
    groups: dict[tuple[str, ...], int] = {}
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        bits = number(row.bits_per_weight)
        key = (
            re.sub(r"\d+", "*", row.name),
            row.role,
            shape,
            row.weight or "-",
            row.activation or "-",
            bits,
            row.reason or "",
        )
        groups[key] = groups.get(key, 0) + 1
    listed = table(
        "layers", "of", "role", "shape", "weight", "input", "bits", "left alone because", numbers=("of", "bits")
    )
    for (name, *rest), count in groups.items():
        listed.add_row(name, str(count), *rest)
    show_table(listed)


def check_page(page: Path | None) -> None:
    """Refuses a ``--report`` that could not be written, before work that takes long."""
    if page is not None:
        from lowbit.reporting.page import check_target

        check_target(page)


def write_page(page: Path | None, results: Path) -> None:
    """Writes the page of ``--report`` on what a command has written to ``results``."""
    if page is not None:
        from lowbit.reporting import write_report

        write_report([results], page)
        say(f"{page}: {size(page.stat().st_size)}")


# Errors


class Terminated(KeyboardInterrupt):
    """SIGTERM, as ``kill`` and a system's shutdown send it. It ends a command as Ctrl-C does."""


def guarded(command: Callable[..., None], interrupted: str = "interrupted") -> Callable[..., None]:
    """``command`` with errors as one line on stderr and exit code 1, and Ctrl-C as 130 with a line ``interrupted``, SIGTERM
    as 143 with the same line. --verbose and LOWBIT_DEBUG=1 show tracebacks.

    Only what a user can cause is caught: a defect of this program keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, verbose: bool = False, **kwargs: Any) -> None:
        set_output(_quiet or quiet, _verbose or verbose)  # asked for before the command's name, or after it
        debug = _verbose or os.environ.get("LOWBIT_DEBUG", "") not in ("", "0")
        try:
            if not debug:
                _silence_libraries()
            with _terminable(), _lines_of_warnings():
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # typer's: whoever read stdout has enough
        except (ValueError, OSError) as error:
            if debug:
                raise
            fail(f"{error}{_after_full_disk(error)}")
            raise SystemExit(1) from error
        except KeyboardInterrupt as stop:
            typer.echo(interrupted, err=True)
            raise SystemExit(143 if isinstance(stop, Terminated) else 130) from stop

    # typer reads options from the signature: these two belong to every command
    own = inspect.signature(command, eval_str=True)
    added = {"quiet": Quiet, "verbose": Verbose}
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in added.items()]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = command.__annotations__ | added
    return run


@contextmanager
def _terminable() -> Iterator[None]:
    """While open, SIGTERM raises :class:`Terminated` in the main thread, so that temporary files are removed."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _silence_libraries() -> None:
    """No bars and no advice of transformers' and datasets' own between ours; their errors stay.

    By the variables that they read when they are imported, so that a command imports them only if it needs them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


# Progress


@contextmanager
def progress() -> Iterator[Report]:
    """One bar on stderr with percentage, elapsed and remaining time; a line now and then where it is no terminal."""
    if _quiet:
        yield silent
        return
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _lines()
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    # Speed over minutes: a block's steps are not equally fast, and an ETA that jumps is none.
    with Progress(*columns, console=screen, refresh_per_second=4, speed_estimate_period=300, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        last = (0.0, 0.0)

        def report(done: float, total: float, what: str) -> None:
            nonlocal last
            if total != last[1] or done < last[0]:  # another phase has begun
                bar.reset(task, total=total)
            last = (done, total)
            bar.update(task, completed=done, total=total, description=what)

        yield report


def _lines() -> Report:
    last_line = time.monotonic()
    began, last = last_line, (0.0, 0.0)

    def report(done: float, total: float, what: str) -> None:
        nonlocal last_line, began, last
        now = time.monotonic()
        if total != last[1] or done < last[0]:  # another phase has begun
            began = now
        last = (done, total)
        if now - last_line < LOG_SECONDS:
            return
        last_line, elapsed = now, now - began
        left = f", ETA {_clock(elapsed * (total - done) / done)}" if done > 0 else ""
        say(f"{what}: {done / total:.0%}, elapsed {_clock(elapsed)}{left}")

    return report


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# Options


def use_threads(threads: int | None) -> None:
    """Sets torch's threads where the user gave a number."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def text_or_default(text: str | None, split: str) -> str:
    """``text``, or where none was given wikitext2 if a hub answers, else python-docs."""
    if text is not None:
        return text
    from lowbit.texts import PYTHON_DOCS, TextError, load_text

    try:
        load_text("wikitext2", split)  # pyright: ignore[reportArgumentType]
    except TextError:
        return PYTHON_DOCS
    return "wikitext2"
