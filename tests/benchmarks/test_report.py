"""Reports, and the blocks of the README and docs/benchmarks.md, are made from the results."""

import pytest

from benchmarks.data.cases import decode, prefill
from benchmarks.data.instances import SearchCase
from benchmarks.data.models import MILD, SKEWED
from benchmarks.data.suites import BOTH
from benchmarks.measure.harness import row_key
from benchmarks.report import report
from benchmarks.report.results import FOLDER, Results
from benchmarks.studies import memory

HEADER = {
    "schema": 1, "device": "Test CPU", "device_type": "cpu", "driver": None, "threads": 2,
    "versions": {"torch": "2.13.0"}, "commit": "abcdef", "date": "2026-11-22 04:00 UTC",
    "suite": "cpu", "contestants": {"cpu": "available", "fa3-rows": "needs a CUDA GPU"},
    "limits": {"memory": [{"bytes": 1 << 28, "rate": 2e10}], "compute": {"bfloat16": 1e11}},
}  # fmt: skip
CASES = [
    *(case for n in (1024, 8192) for case in decode("llama-3-8b", BOTH, 1, n)),
    *decode("llama-3-8b", (MILD,), 1, 8192),
    *decode("llama-2-7b", ("uneven-2", "uneven-4"), 1, 4096),
    *prefill("llama-3-8b", BOTH, 1, 1024),
]
TIMES = {
    "cpu": 1.0,
    "cpu, even map": 0.8,
    "expand+sdpa": 8.0,
    "expanded-sdpa": 0.5,
    "sdpa-rows": 2.0,
    "sdpa-padded": 3.0,
}


def made_up(case, contestant, times):
    row = {
        "key": row_key(case, contestant), "case_key": case.key, "contestant": contestant,
        "kind": {"cpu": "backend", "cpu, even map": "control"}.get(contestant, "peer"),
        "case": {
            "op": case.op, "model": case.model, "map": case.map, "batch": case.batch,
            "q_len": case.q_len, "kv_len": case.kv_len, "dtype": case.dtype, "window": None,
            "cold": False, "num_heads": 32, "num_kv_heads": case.head_map.num_kv_heads,
            "group_sizes": list(case.head_map.group_sizes),
        },
    }  # fmt: skip
    if times is None:
        return row | {"status": "wrong", "reason": "out: error 1 exceeds 0.1"}
    seconds = times * case.work.bytes / 1e10
    return row | {
        "status": "ok", "median": seconds, "low": seconds, "high": seconds, "samples": 5,
        "bytes": case.work.bytes, "flops": case.work.flops, "bound_by": "memory",
        "gbytes_per_second": case.work.bytes / seconds / 1e9,
        "tflops": case.work.flops / seconds / 1e12,
        "limit_seconds": seconds / 2, "percent_of_limit": 50.0,
    }  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder of results, a README and a page of results."""
    rows = [made_up(case, name, times) for case in CASES for name, times in TIMES.items()]
    rows += [made_up(CASES[0], "sdpa-per-size", None)]
    searched = SearchCase("planted", 8, 3)
    facts = {"kind": "backend", "status": "ok", "median": 1e-3, "low": 1e-3, "high": 1e-3}
    facts |= {"objective": 1.0, "random_objective": 2.0, "proved": True, "lower_bound": 1.0}
    rows += [{"key": row_key(searched, "exact"), "case_key": searched.key, "case": searched.facts,
              "contestant": "exact", **facts}]  # fmt: skip
    Results(dict(HEADER), rows).save(tmp_path / "results" / "test-cpu" / "cpu.json")
    for name in ("README.md", "page.md"):
        (tmp_path / name).write_text(f"# Top\n\n{report.BEGIN}\nearlier\n{report.END}\n\nrest\n")
    options = {"results": "results", "readme": "README.md", "page": "page.md"}
    return [word for k, name in options.items() for word in (f"--{k}", str(tmp_path / name))]


def test_written_report_is_current_and_edits_make_it_stale(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.main([*place, "--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert report.main(place) == 0
    assert report.main([*place, "--check"]) == 0

    readme = tmp_path / "README.md"
    text = readme.read_text()
    assert text.startswith("# Top\n") and text.endswith("\nrest\n") and "earlier" not in text
    readme.write_text(text.replace("8.00x", "9.00x"))
    assert report.main([*place, "--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "README.md is stale: run python -m benchmarks.report"
    ]

    path = tmp_path / "results" / "test-cpu" / "cpu.json"
    path.write_text(path.read_text().replace('"commit": "abcdef"', '"commit": "fedcba"'))
    report.main([*place, "--check"])
    assert "test-cpu/report.md is stale" in capsys.readouterr().err


def test_figures_are_small_and_redrawn_when_the_data_change(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.main(place) == 0
    folder = tmp_path / "results" / "test-cpu"
    drawn = {path.name: path.stat().st_size for path in folder.glob("*.svg")}
    assert set(drawn) == {"roofline.svg", "bandwidth.svg", "groups.svg", "skew.svg"}
    assert max(drawn.values()) < 200_000
    results = Results.load(folder / "cpu.json")
    for row in results.rows:
        if "tflops" in row:
            row["tflops"] *= 2
    results.save(folder / "cpu.json")
    assert report.main([*place, "--check"]) == 1
    assert "roofline.svg is stale" in capsys.readouterr().err


def test_tables_show_wins_and_losses_and_where_they_were_measured(place, tmp_path):
    pytest.importorskip("matplotlib")
    report.main(place)
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "page.md"))
    for fact in ("Test CPU", "2 CPU threads", "commit abcdef", "skew.svg"):
        assert fact in readme
    assert 1 <= sum(line.startswith("| decode: ") for line in readme.splitlines()) <= 5
    for fact in ("Test CPU", "2 CPU threads", "torch 2.13.0", "commit abcdef", "20.0 GB/s"):
        assert fact in page
    line = next(x for x in page.splitlines() if x.startswith(f"| decode: llama-3-8b {BOTH[1]}"))
    assert line.split(" | ")[3:] == ["50 %", "1.25", "8.00x", "**0.50x**", "2.00x |"]
    assert "expand + SDPA: ours is faster on 9 of 9 cases" in page and "9 of 9 cases" in readme
    assert "SDPA, expanded cache: ours is faster on 0 of 9 cases" in page
    written = (tmp_path / "results" / "test-cpu" / "report.md").read_text()
    assert "| exact | 1.00 ms, proved optimal |" in written and "objective" not in page
    assert "sdpa-per-size wrong: out: error 1 exceeds 0.1" in written
    assert "- fa3-rows: needs a CUDA GPU" in written


def test_peak_memory_has_a_table(place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    case = memory._case("llama-3.2-1b", SKEWED, 4096, "float32")
    facts = {"case_key": case.key, "case": case.facts, "expanded_bytes": 128 << 20}
    peaks = {"cpu": 83 << 20, "expand+sdpa": 226 << 20}
    rows = [
        {"key": row_key(case, name), "contestant": name, "peak_bytes": peak, **facts}
        for name, peak in peaks.items()
    ]
    about = {**HEADER, "suite": "memory", "limits": None}
    Results(about, rows).save(tmp_path / "results" / "test-cpu" / "memory.json")
    assert report.main(place) == 0 and report.main([*place, "--check"]) == 0
    cells = "4096 keys, float32 | 83 MiB | 226 MiB | 143 MiB | 128 MiB |"
    for path in (tmp_path / "page.md", tmp_path / "results" / "test-cpu" / "report.md"):
        assert cells in path.read_text() and "faster on 9 of 9 cases" in path.read_text()
    (tmp_path / "results" / "test-cpu" / "memory.json").unlink()
    assert report.main([*place, "--check"]) == 1
    assert "test-cpu/report.md is stale" in capsys.readouterr().err


def test_markers_are_required():
    with pytest.raises(ValueError, match="a page must have one"):
        report.with_block("no markers", "")


def test_the_repository_is_current():
    """The committed results, reports, figures and README belong together."""
    if not report.load_all(FOLDER):
        pytest.skip("no results are committed")
    assert report.main(["--check"]) == 0


def test_a_whole_model_in_vllm(place, tmp_path):
    """A table on the page, a line in the README."""
    pytest.importorskip("matplotlib")
    facts = {
        "low": 1.0, "high": 300.0, "prompt": 256, "new": 32, "requests": 16, "tokens": 512,
        "kv_bytes_per_token": 23040.0, "requests_as_stock": 6, "tokens_as_fp32": 505,
        "furthest_below": 0.0625,
    }  # fmt: skip
    rows = [
        {"key": f"{dtype} {name}", "contestant": name, "dtype": dtype, "tokens_per_second": speed,
         **facts}
        for dtype in ("bfloat16", "float32")
        for name, speed in (("theirs", 181.6), ("ours", 193.6))
    ]  # fmt: skip
    Results({**HEADER, "limits": None}, rows).save(tmp_path / "results" / "generate" / "vllm.json")
    assert report.main(place) == 0 and report.main([*place, "--check"]) == 0
    page, readme = ((tmp_path / name).read_text() for name in ("page.md", "README.md"))
    assert (
        "| ours, bfloat16, 16 requests of 256 + 32 tokens | 194 | 1 to 300 | 23,040 bytes | "
        "6 of 16 | 505 of 512 | 0.06 |"
    ) in page
    assert "ours, float32" in page
    assert readme.count("bfloat16, 16 requests of 256 + 32 tokens, tokens/s: theirs 182; ours 194.")
