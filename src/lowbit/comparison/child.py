"""Runs work in a process of its own: its memory can be measured, and a crash costs one row only.

The work is pickled to the process's stdin. Its stdout gives JSON lines: ``{"progress": [share, what]}``, and at the end
the result of :func:`attempt`. multiprocessing's spawn needs a main module that can be imported again, which a notebook
or ``python -c`` does not have.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

START = "from lowbit.comparison.child import main; main()"
REPORT_SECONDS = 0.2  # between two progress lines
TAIL = 3  # lines of a crashed process's log in its row's error


class Work(Protocol):
    """A picklable task. ``run(progress)`` returns JSON data or raises."""

    def run(self, progress: Any) -> dict[str, Any]: ...


def attempt(work: Work, progress: Any) -> dict[str, Any]:
    """The figures of ``work``, or ``{"error": ...}``, with a ``traceback`` unless the error is the user's."""
    try:
        return work.run(progress)
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def run_in_child(work: Work, threads: int, log: Path, progress: Any) -> dict[str, Any]:
    """Runs :func:`attempt` in a new process. The process is gone when this returns or raises, even on Ctrl-C.

    Args:
        work: a value that pickle can send; its types must be importable.
        threads: torch's threads in the process.
        log: a file for everything else that the process prints.
        progress: called as ``progress(share, what)``.

    Returns:
        The result of :func:`attempt`, or ``{"error": ...}`` if the process died.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)  # what can be imported here can be imported there
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", START]
    with (
        log.open("w+b") as words,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=environment
        ) as process,
    ):
        try:
            answer = _talk(process, pickle.dumps((work, threads)), progress)
        finally:
            process.kill()
            process.wait()
        if answer is not None:
            return answer
        words.seek(0)
        lines = words.read().decode("utf-8", "replace").strip().splitlines()
    return {"error": _crash(process.returncode, lines[-TAIL:])}


def _talk(process: subprocess.Popen[bytes], request: bytes, progress: Any) -> dict[str, Any] | None:
    """Sends the work and reads until the answer. None if the process ended without one."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:
        pass  # the process died before it read the work; the log says why
    for line in process.stdout:
        message = json.loads(line)
        if "progress" not in message:
            process.wait()
            return message
        progress(*message["progress"])
    process.wait()
    return None


def _crash(code: int, lines: list[str]) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}: {' / '.join(lines)}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    killed = name == "SIGKILL"
    reason = ", as the system does when memory runs out" if killed else f": {' / '.join(lines)}" if lines else ""
    return f"the process was ended by {name}{reason}"


def main() -> None:
    """The child process: reads the work from stdin, does it, and answers on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the parent decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # output of libraries is no answer
    last_report = -REPORT_SECONDS

    def report(share: float, what: str) -> None:
        nonlocal last_report
        if time.monotonic() - last_report >= REPORT_SECONDS:
            last_report = time.monotonic()
            answers.write(json.dumps({"progress": [share, what]}) + "\n")

    work, threads = pickle.load(sys.stdin.buffer)
    import torch

    torch.set_num_threads(threads)
    answer = attempt(work, report)
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
