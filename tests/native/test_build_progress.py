"""How far a build is: lines, or one bar on a terminal."""

import io
import sys

import pytest

from gqa_kernels.native import build_progress
from gqa_kernels.native.build_progress import WIDTH, BuildProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(build_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_each_file_in_a_log(clock, capsys):
    progress = BuildProgress()
    progress.expected = 60.0
    clock[0] += 20
    progress.show(1, 3, "cpu/isa/forward_avx2")
    clock[0] += 50
    progress.show(2, 3, "host/append")  # longer than expected: no guess
    progress.show(3, 3, "linked")
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "gqa_kernels: [1/3] cpu/isa/forward_avx2, 20 s, about 40 s left",
        "gqa_kernels: [2/3] host/append, 70 s",
        "gqa_kernels: [3/3] linked, 70 s",
    ]


def test_a_bar_on_a_terminal(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = BuildProgress()
    progress.show(1, 2, "a name that is long")
    progress.show(2, 2, "short")
    progress.end()
    first, second = terminal.getvalue().removesuffix("\n").split("\r")[1:]
    assert f" {'#' * (WIDTH // 2)}{'.' * (WIDTH // 2)} [1/2] a name that is long, 0 s" in first
    assert f" {'#' * WIDTH} [2/2] short, 0 s" in second
    assert len(second) == len(first)  # nothing of the longer line stays visible
    assert terminal.getvalue().endswith("\n")
