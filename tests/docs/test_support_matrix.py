"""The table of supported features is current, and has every feature."""

from gqa_kernels.backends.base import ALL_CACHES, ALL_OPTIONS
from gqa_kernels.backends.dispatch import BACKENDS
from tools import support_matrix


def test_is_current():
    assert support_matrix.main(["--check"]) == 0, "run python -m tools.support_matrix"


def test_every_feature_and_backend_has_a_label():
    assert set(support_matrix.OPTIONS) == ALL_OPTIONS
    assert set(support_matrix.CACHES) == ALL_CACHES
    assert set(support_matrix.NAMES) == set(support_matrix.RUNS_ON) == set(BACKENDS)


def test_cells_are_the_capabilities(monkeypatch):
    row = next(x for x in support_matrix.table().splitlines() if x.startswith("| `batch_inv"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    has = ["batch_invariant" in BACKENDS[n].capabilities.options for n in support_matrix.NAMES]
    assert cells == ["yes" if x else "no" for x in has]
    assert cells[0] == "yes"


def test_a_stale_page_is_noticed(monkeypatch, capsys):
    monkeypatch.setitem(support_matrix.RUNS_ON, "cpu", "elsewhere")
    assert support_matrix.main(["--check"]) == 1
    assert "support.md is stale" in capsys.readouterr().err
