"""Every method on every architecture in whole runs, as listed in docs/matrix.md."""

from __future__ import annotations

import pytest

from laws.test_architectures import CASES
from matrix import QUANTIZERS, outcome, read_page, save_model, whole_cells

WHOLE = whole_cells()


def test_the_page_has_every_method_and_every_architecture():
    by_case, _ = read_page()
    assert list(by_case) == list(CASES), "run `make docs`"
    assert all(list(row) == QUANTIZERS for row in by_case.values()), "run `make docs`"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_method_runs_on_every_architecture_and_reloads_as_it_was_measured(case, tmp_path):
    """The run itself compares the reloaded model with the measured one and refuses a difference: ``whole_cells``."""
    original, wanted = save_model(case, tmp_path / "model"), read_page()[0][case]
    for name in QUANTIZERS:
        found = outcome(name, original, tmp_path / "model", tmp_path / name, whole=(case, name) in WHOLE)
        assert found == wanted[name], name
