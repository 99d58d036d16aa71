"""The course of a training: a line of JSON for each step, the same for TensorBoard where it is installed, and a plot of it."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.whole_file import naming, write_whole, write_whole_text

Row = dict[str, Any]
"""``step``, ``tokens`` (trained on so far), ``loss`` (of the step; None for step 0, the start), ``held_out_kl`` and
``held_out_loss`` (nats a token, one of the two, or None: not measured at this step), ``lr`` and ``seconds`` (since the training began, without the time that it was stopped)."""


class Curve:
    """Writes rows as they are made.

    Args:
        path: the file of JSON lines. Rows that it has up to step ``kept`` stay, later ones were lost with what they describe.
        kept: None: the training begins anew.
        logs: the directory for TensorBoard; it is written anew.
    """

    def __init__(self, path: Path, logs: Path | None = None, kept: int | None = None):
        self.path, self._writer = path, None
        rows: list[Row] = []
        if kept is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] <= kept]
        write_whole_text(path, "".join(map(_line, rows)))  # a kill leaves the old rows or these
        if logs is not None:
            shutil.rmtree(logs, ignore_errors=True)
            self._writer = _tensorboard(logs)
        for row in rows:
            self._log(row)

    def add(self, row: Row) -> None:
        """Appends a row. Raises OSError, which names the file, where it cannot be written."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self._log(row)

    def close(self) -> None:
        """Ends the logs."""
        if self._writer is not None:
            self._writer.close()

    def _log(self, row: Row) -> None:
        if self._writer is None:
            return
        for name in ("loss", "held_out_kl", "held_out_loss", "lr"):
            if row.get(name) is not None:
                self._writer.add_scalar(name, row[name], row["step"], walltime=time.time())


def draw_curve(path: Path, target: Path) -> None:
    """Draws the rows of a curve's file as SVG: the loss, and what was measured on held-out text, against tokens.

    Without rows of steps there is nothing to see, and nothing is written. The same rows give the same bytes.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if len(rows) < 2:
        return
    from matplotlib import rc_context  # takes half a second, at the end of a training only
    from matplotlib.figure import Figure

    shown = {"loss": "loss of a step", "held_out_kl": "KL on held-out text", "held_out_loss": "loss on held-out text"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in shown.items():
        points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            style = {"alpha": 0.5, "linewidth": 1} if name == "loss" else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="tokens trained on", ylabel="nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    with rc_context({"svg.hashsalt": "lowbit"}):
        write_whole(target, partial(figure.savefig, format="svg", metadata={"Date": None}))


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _tensorboard(logs: Path) -> Any:
    """A writer into ``logs``; None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(logs))
