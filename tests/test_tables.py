from __future__ import annotations

import pytest

from mhabridge.cli.tables import Column, fitting

click = pytest.importorskip("rich", reason="rich is not installed")

COLUMNS = [Column("a"), Column("bb", drop=2), Column("ccc", drop=1), Column("d")]
ROWS = [["1234", "12", "1", "12345678"]]


@pytest.mark.parametrize(("width", "kept"), [(40, [0, 1, 2, 3]), (26, [0, 2, 3]), (20, [0, 3]), (3, [0, 3])])
def test_columns_go_in_their_order_and_the_others_stay(width: int | None, kept: list[int]) -> None:
    assert fitting(COLUMNS, ROWS, width) == kept


def test_a_piped_table_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from mhabridge.cli.tables import print_table

    row = ["x" * 60, "y" * 60, "z" * 60, "w"]
    print_table(COLUMNS, [row], title="a title")
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell in line for cell in row) for line in lines)
    assert lines[0].strip() == "a title"


def test_a_hostile_path_is_cut_and_nested_no_deeper_than_people_read() -> None:
    from mhabridge.cli.tree import lines
    from mhabridge.diff.report import DiffReport, Layer

    names = [".".join("a" * 5000), "b" * 1_000_000]
    found = lines(DiffReport((), (), layers=tuple(Layer(name, name) for name in names)))
    assert max(len(line.path) for line in found) < 20
    assert all(len(".".join(line.path)) <= 200 for line in found)
