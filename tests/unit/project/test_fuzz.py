"""A few of the cases of tests/fuzz.py; `make fuzz` runs hundreds."""

from fuzz import failures


def test_mutated_checkpoints_and_recipes_end_in_one_line_or_in_finite_logits():
    said = []
    assert not failures(12, seed=0, kind="all", methods=2, report=said.append), said
    assert "checkpoint refused" in said[-1] and "checkpoint ran" in said[-1] and "recipe refused" in said[-1]
