"""first_calls.py: what becomes of a call that is wrong, dies, hangs or ruins the GPU's context."""

import json
import sys

import pytest

from benchmarks.studies import first_calls

NAMES = ["decode on cuda", "prefill on cuda", "backward on cuda"]
# Stands in for the process that runs the calls: the actions of the first one that is left.
PROGRAM = """
import json, os, sys, time
names = sys.argv[sys.argv.index("--work") + 1 : sys.argv.index("--device")]
actions = json.loads({actions!r})
for name in names:
    print(json.dumps({{"begin": name}}), flush=True)
    action = actions.get(name, "ok")
    if action == "dies": os._exit(7)
    if action == "hangs": time.sleep(60)
    print("a line of no JSON", flush=True)
    print(json.dumps({{"call": name, "status": action, "reason": ""}}), flush=True)
    if action == "error": break
"""


@pytest.mark.parametrize(
    "name, action, reason",
    [
        *((name, "dies", "exit status 7") for name in NAMES),
        *((name, "error", "") for name in NAMES),
        (NAMES[1], "hangs", "no answer within"),
    ],
)
def test_the_others_go_on(name, action, reason):
    program = PROGRAM.format(actions=json.dumps({name: action}))
    rows = []
    limit = 10 if action == "hangs" else 60
    first_calls.run_calls(NAMES, "cuda", [sys.executable, "-c", program], rows.append, limit)
    status = "error" if action == "error" else "died"
    assert [row["call"] for row in rows] == NAMES
    assert {row["call"]: row["status"] for row in rows} == {
        **dict.fromkeys(NAMES, "ok"),
        name: status,
    }
    assert reason in rows[NAMES.index(name)]["reason"]


def test_a_process_that_can_not_start(monkeypatch):
    rows = []
    first_calls.run_calls(
        NAMES[:2], "cuda", [sys.executable, "-c", "raise SystemExit(4)"], rows.append
    )
    assert [(row["status"], row["reason"]) for row in rows] == [("died", "exit status 4")] * 2


def test_a_wrong_result_is_a_row_with_the_reason(monkeypatch, tmp_path, capsys):
    """A call that disagrees with the reference gets the status ``wrong``."""

    def wrong(device, backend):
        raise AssertionError("out: error 1.0, allowed 0.1")

    monkeypatch.setitem(first_calls.CALLS, "decode", wrong)
    first_calls._work(["decode on cpu"], "cpu")
    row = json.loads(capsys.readouterr().out.splitlines()[1])
    assert (row["status"], row["reason"]) == ("wrong", "out: error 1.0, allowed 0.1")


def test_calls_that_compute_something_else_are_wrong(monkeypatch):
    """Each op is compared with the reference: halve what it returns."""
    from gqa_kernels import asym_gqa_attention

    def halved(*args, **options):
        out = asym_gqa_attention(*args, **options)
        return (out[0] / 2, out[1]) if isinstance(out, tuple) else out / 2

    monkeypatch.setattr(first_calls, "asym_gqa_attention", halved)
    for call in ("decode", "prefill", "prefill with options", "backward"):
        with pytest.raises(AssertionError):
            first_calls.CALLS[call]("cpu", "cpu")


def test_every_fused_backend_of_a_device_is_called(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setattr(first_calls.BACKENDS[name], "unavailable_reason", lambda: None)
    names = first_calls.names_of("cuda")
    assert names == [f"{op} on {name}" for name in ("cuda", "triton") for op in first_calls.CALLS]
    assert not any("graph" in name for name in first_calls.names_of("cpu"))
