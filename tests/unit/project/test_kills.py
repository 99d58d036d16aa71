"""A few of the runs of tests/kills.py; `make kills` does a hundred."""

import subprocess
import sys

import kills


def test_killed_runs_end_in_the_bytes_of_undisturbed_ones_and_leave_nothing():
    # In a process of its own: forks must come before threads, of which other tests have left some.
    command = [sys.executable, kills.__file__, "--count", "4", "--commands", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "4 runs, 0 failures" in run.stdout, run.stdout + run.stderr
