"""What came of each stage of gpu_session.sh, as JSON: ``python -m benchmarks.report.session``.

    python -m benchmarks.report.session stages.json cuda-tests 1 42 tests.xml

adds the stage with its exit status, its seconds, and of a run of pytest (its JUnit file) how many
tests passed and which did not. It only reads and writes files, so it takes no GPU time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MESSAGE = 300  # characters of what a failed test says


def results_of_tests(path: Path) -> dict[str, Any]:
    """Counts by outcome, and what failed. A run that was ended has left no file."""
    if not path.exists() or not path.stat().st_size:
        return {"tests": None}
    cases = list(ElementTree.parse(path).iter("testcase"))
    found: dict[str, Any] = {"tests": len(cases), "skipped": 0, "failed": {}}
    for case in cases:
        found["skipped"] += case.find("skipped") is not None
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                name = f"{case.get('classname')}::{case.get('name')}"
                found["failed"][name] = (problem.get("message") or "")[:MESSAGE]
    return found


def main(arguments: Sequence[str]) -> None:
    path, name, status, seconds, *junit = arguments
    stages = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    stage: dict[str, Any] = {"exit": int(status), "seconds": int(seconds)}
    for file in junit:
        stage |= results_of_tests(Path(file))
    stages[name] = stage
    Path(path).write_text(json.dumps(stages, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
