"""gpu_session.sh on a machine whose programs are stand-ins: order, resuming, limits, arguments.

The last test rehearses the whole script on the CPU: what it calls of our own runs, on few cases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.data.suites import SUITES
from gqa_kernels.native import build

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
STAGES = ["first", "cuda-tests", "tests", "memcheck", "racecheck", "gpu", "scaling-gpu", "e2e-gpu"]
# Writes down how it was called; a suite leaves results. $FAIL: what to fail at; $REAL: what runs.
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" | tr '\\n' ' ' >> "$CALLS"; echo >> "$CALLS"
[[ -n "$FAIL" && "$*" == *"$FAIL"* ]] && exit 3
if [[ "$(basename "$0")" == python3 && "$*" =~ benchmarks.report.session|$REAL ]]; then
  exec "$PYTHON" "$@"
fi
while (($#)); do
  [[ "$1" == --json ]] && echo '{"rows": [], "commit": "abc"}' > "$2"
  [[ "$1" == --junitxml ]] && echo "$JUNIT" > "$2"
  shift
done
echo "$LAST_WORDS"
"""

JUNIT = """<testsuites><testsuite><testcase classname="a" name="fine"/>
<testcase classname="a" name="left out"><skipped message="no"/></testcase>
<testcase classname="a" name="broken"><failure message="1 != 2">long</failure></testcase>
</testsuite></testsuites>"""


class Session:
    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        programs = folder / "bin"
        programs.mkdir()
        for name in ("python3", "nvidia-smi", "compute-sanitizer"):
            (programs / name).write_text(PROGRAM)
            (programs / name).chmod(0o755)
        self.programs = programs
        self.path = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def __call__(self, name: str, **settings: str) -> list[str]:
        """Runs the script; how its programs were called."""
        self.calls.write_text("")
        environment = {
            "PATH": self.path, "HOME": str(self.folder), "CALLS": str(self.calls), "FAIL": "",
            "LAST_WORDS": "", "REAL": "^$", "PYTHON": sys.executable, "JUNIT": JUNIT,
            "OUT": str(self.folder / name), **settings,
        }  # fmt: skip
        result = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        self.output = result.stdout
        return self.calls.read_text().splitlines()

    def read(self, name: str, file: str):
        return json.loads((self.folder / name / file).read_text())

    def state(self, name: str) -> dict[str, str]:
        stages = self.read(name, "stages.json")
        return {stage: str(found["exit"]) for stage, found in stages.items()}


@pytest.fixture
def session(tmp_path):
    if shutil.which("timeout") is None:
        pytest.skip("needs coreutils' timeout")
    return Session(tmp_path)


def test_builds_then_tests_then_measures_with_arguments_that_exist(session):
    calls = session("first")
    first = next(i for i, call in enumerate(calls) if "first_calls" in call)
    tests = next(i for i, call in enumerate(calls) if "test_cuda.py" in call)
    suite = next(i for i, call in enumerate(calls) if "--suite gpu" in call)
    assert first < tests < suite
    assert session.state("first") == dict.fromkeys(STAGES, "0")
    left = {path.name for path in (session.folder / "first").iterdir()}
    suites = {"gpu.json", "scaling-gpu.json", "e2e-gpu.json"}
    assert left == suites | {"first.json", "session.log", "stages.json"}  # eight may come back
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
    assert not (session.folder / "second" / "stages.json").exists()
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
    assert not (session.folder / "short" / "stages.json").exists()


def test_a_rehearsal_on_the_cpu(session):
    """First calls for real, twice, the second time under a stand-in for the sanitizer; results of
    tests from their file; and every stage after one that failed."""
    build.load()  # which may take minutes, and a stage has fewer
    sanitizer = session.programs / "compute-sanitizer"
    sanitizer.write_text(
        '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift 2; done\nexec "$@"\n'
    )
    session(
        "rehearsal", GQA_DEVICE="cpu", REAL="first_calls", FAIL="--suite gpu",
        **{name: value for name in ("CXX", "GQA_KERNELS_CACHE", "CCACHE_BASEDIR")
           if (value := os.environ.get(name))},
    )  # fmt: skip
    rows = session.read("rehearsal", "first.json")["rows"]
    by_call = {row["call"]: row for row in rows}
    assert by_call["build cpu"]["status"] == "ok"
    assert {f"{name} on cpu" for name in ("decode", "paged cache", "backward")} <= set(by_call)
    assert all(row["status"] == "ok" for row in rows), rows
    assert [row["call"] for row in rows if "under" in row] == ["decode on cpu", "prefill on cpu"]
    assert session.state("rehearsal") == {**dict.fromkeys(STAGES, "0"), "gpu": "3"}
    tests = session.read("rehearsal", "stages.json")["tests"]
    assert (tests["tests"], tests["skipped"]) == (3, 1)
    assert tests["failed"] == {"a::broken": "1 != 2"}
