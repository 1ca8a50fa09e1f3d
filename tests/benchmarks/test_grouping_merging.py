"""The table, the findings and the figure of the merging benchmark, from rows made up here."""

import pytest

from benchmarks.studies.merging import METHODS, Row, figure, findings, table


def rows():
    made = []
    for count, base in ((6, 1.0), (3, 2.0)):
        for place, method in enumerate(METHODS):
            sizes = "even" if method.sizes == "equal" else "uneven"
            made.append(
                Row(
                    method=method.name,
                    sizes="choice" if method.search is None else sizes,
                    merging=method.merging,
                    kv_heads=count,
                    error=base / (1 + place),
                    errors=[base / (1 + place)] * 2,
                    even=[True, False],
                )
            )
    return made


def test_every_row_is_in_the_table():
    text = table(rows())
    assert text.count("\n") == 2 + len(METHODS)
    assert "| neighbours (GQA) | even | mean | 1.000 | 2.000 |" in text


def test_findings_are_ratios_of_the_rows():
    made = rows()
    text = findings(made)
    exact = [row.error for row in made if row.merging == "aligned" and "exact" in row.method]
    assert f"6 KV heads: the best exact + aligned is {1 / min(exact[:5]):.2f}x below" in text
    assert "uneven in 1 of 2 layers" in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figure(tmp_path, suffix):
    path = tmp_path / f"errors.{suffix}"
    figure(rows(), path)
    assert 1000 < path.stat().st_size < 200_000
