"""gpu_session.sh on a machine whose programs are stand-ins: order, resuming, limits, arguments."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.data.suites import SUITES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
STAGES = ["cuda-tests", "tests", "memcheck", "racecheck", "gpu", "scaling-gpu", "e2e-gpu"]
# Writes down how it was called; a suite leaves results. $FAIL: what to fail at.
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" | tr '\\n' ' ' >> "$CALLS"; echo >> "$CALLS"
[[ -n "$FAIL" && "$*" == *"$FAIL"* ]] && exit 3
while (($#)); do
  [[ "$1" == --json ]] && echo '{"rows": [], "commit": "abc"}' > "$2"
  shift
done
echo "$LAST_WORDS"
"""


class Session:
    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python3", "nvidia-smi", "compute-sanitizer"):
            (programs / name).write_text(PROGRAM)
            (programs / name).chmod(0o755)
        self.path = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def __call__(self, name: str, **settings: str) -> list[str]:
        """Runs the script; how its programs were called."""
        self.calls.write_text("")
        environment = {
            "PATH": self.path, "HOME": str(self.folder), "CALLS": str(self.calls), "FAIL": "",
            "LAST_WORDS": "", "OUT": str(self.folder / name), **settings,
        }  # fmt: skip
        result = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        self.output = result.stdout
        return self.calls.read_text().splitlines()

    def state(self, name: str) -> dict[str, str]:
        lines = (self.folder / name / "stages.txt").read_text().splitlines()
        return dict(line.split() for line in lines)


@pytest.fixture
def session(tmp_path):
    if shutil.which("timeout") is None:
        pytest.skip("needs coreutils' timeout")
    return Session(tmp_path)


def test_builds_then_tests_then_measures_with_arguments_that_exist(session):
    calls = session("first")
    build = next(i for i, call in enumerate(calls) if "build.load" in call)
    tests = next(i for i, call in enumerate(calls) if "test_cuda.py" in call)
    suite = next(i for i, call in enumerate(calls) if "--suite gpu" in call)
    assert build < tests < suite
    assert session.state("first") == dict.fromkeys(STAGES, "0")
    left = {path.name for path in (session.folder / "first").iterdir()}
    suites = {"gpu.json", "scaling-gpu.json", "e2e-gpu.json"}
    assert left == suites | {"session.log", "stages.txt"}  # eight files may come back at most
    # What a sanitizer can't see, it can't check: pytest must not start workers under it.
    sanitized = [call for call in calls if call.startswith("compute-sanitizer")]
    assert len(sanitized) == 2 and all("-n 0" in call for call in sanitized)
    suites = []
    for words in map(str.split, calls):
        if "benchmarks.run" in words:
            arguments = run._parser().parse_args(words[words.index("benchmarks.run") + 1 :])
            assert arguments.resume and 0 < arguments.budget < 540
            suites.append(arguments.suite)
        for word in words:
            assert not word.startswith("tests/") or (SCRIPT.parents[1] / word).exists()
    assert set(suites) <= set(SUITES) and len(suites) == 3


def test_goes_on_after_a_failure_and_where_an_earlier_call_stopped(session):
    session("first", FAIL="tests/backends/test_cuda.py")
    state = session.state("first")
    assert list(state) == STAGES and (state["cuda-tests"], state["gpu"]) == ("3", "0")

    session("second", LAST_WORDS="out of time; --resume goes on from here (9 s)",
            GQA_STAGES="gpu scaling-gpu")  # fmt: skip
    assert not (session.folder / "second" / "stages.txt").exists()
    calls = session("third", GQA_RESUME=str(session.folder / "second"), GQA_STAGES="gpu tests")
    assert any("--suite gpu" in call for call in calls)
    calls = session("fourth", GQA_RESUME=str(session.folder / "third"), GQA_STAGES="gpu e2e-gpu")
    assert not any("--suite gpu" in call for call in calls) and "gpu: done before" in session.output
    assert json.loads((session.folder / "fourth" / "gpu.json").read_text())["rows"] == []
    assert list(session.state("fourth")) == ["gpu", "tests", "e2e-gpu"]


def test_no_stage_starts_without_time(session):
    calls = session("short", GQA_BUDGET_S="30", GQA_STAGES="gpu tests")
    assert not any("--suite" in call for call in calls)
    assert session.output.count("no time left") == 2
    assert not (session.folder / "short" / "stages.txt").exists()
