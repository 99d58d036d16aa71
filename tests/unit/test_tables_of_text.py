"""Tables say the same in every form, and no cell breaks out of one."""

from __future__ import annotations

import csv
import io

from lowbit.tables import FORMS, Table, of_mappings

TABLE = Table(
    "A_title",
    ("name", "size", "note"),
    (("a|b", "1.5 MB", "50% & more"), ("c\nd", "-2e3", "{x}_y^z~\\"), ("e", "", "")),
)


def test_csv_reads_back_as_it_was():
    assert list(csv.reader(io.StringIO(FORMS["csv"](TABLE)))) == [list(TABLE.columns), *map(list, TABLE.rows)]


def test_markdown_keeps_one_row_a_line_and_escapes_what_divides_cells():
    lines = FORMS["markdown"](TABLE).splitlines()
    assert lines == [
        r"**A\_title**",
        "",
        "| name | size | note |",
        "|---|---:|---|",
        r"| a\|b | 1.5 MB | 50% & more |",
        r"| c d | -2e3 | {x}\_y^z~\\ |",
        "| e |  |  |",
    ]


def test_latex_escapes_every_special_character():
    lines = FORMS["latex"](TABLE).splitlines()
    assert lines[2:4] == [r"\begin{tabular}{lrl}", r"\toprule"]
    assert r"a|b & 1.5 MB & 50\% \& more \\" in lines
    assert r"c d & -2e3 & \{x\}\_y\textasciicircum{}z\textasciitilde{}\textbackslash{} \\" in lines


def test_columns_of_numbers_are_known_and_sort_by_them():
    assert TABLE.numeric == (False, True, False)
    assert [TABLE.sort_key(row, 1) for row in range(3)] == ["1.5", "-2000.0", ""]


def test_rows_with_different_keys_have_all_columns():
    table = of_mappings("t", [{"a": 1, "b": None}, {"c": [1, 2.5], "d": {"x": True}}])
    assert table.columns == ("a", "b", "c", "d")
    assert table.rows == (("1", "", "", ""), ("", "", "1, 2.5", '{"x": true}'))


def test_empty_columns_are_left_out_but_for_the_first():
    table = Table("", ("", "a", "b"), (("", "", "1"), ("", "", "")))
    assert (table.filled().columns, table.filled().rows) == (("", "b"), (("", "1"), ("", "")))


def test_a_table_without_a_title_has_no_heading_and_no_caption():
    table = Table("", ("a",), (("1",),))
    assert FORMS["markdown"](table) == "| a |\n|---:|\n| 1 |\n"
    assert FORMS["latex"](table).startswith(r"\begin{tabular}{r}") and "caption" not in FORMS["latex"](table)
