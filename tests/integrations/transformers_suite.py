"""transformers' own attention tests, with this package instead of SDPA and FlashAttention.

    python -m tests.integrations.transformers_suite CLONE [--common FILE] [--families llama bert]

CLONE is a clone of huggingface/transformers: its model testers, common and generation tests run
against the transformers installed here. Where the clone is of another commit, FILE can be
``tests/test_modeling_common.py`` from an sdist of just that release (an sdist has no tests of
models and of generation). Nothing of either is kept in this repository. The tests import
parameterized, httpx and timeout-decorator.

What fails is run again with torch's own SDPA: ``fails with stock SDPA too`` is not our doing.
``--save`` writes counts, failures and reasons of skips to benchmarks/results; families that are not
named keep the rows they have there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import torch

import gqa_kernels

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "opt", "gpt2", "gpt_neox", "bert",
    "vit", "t5",
)  # fmt: skip
# Not selected, and importing all of transformers, or what only their own commit of it has.
UNUSED = {
    "test_pipeline_mixin.py": "PipelineTesterMixin",
    "test_fsdp_mixin.py": "FSDPTesterMixin",
    "test_tensor_parallel_mixin.py": "TensorParallelTesterMixin",
}
ROOT = Path(__file__).parents[2]
PATH = ROOT / "benchmarks" / "results" / "transformers_tests.json"
PLUGIN = Path(__file__).parent / "swapped"


def copied(clone: Path, common: Path | None, folder: Path, families: list[str]) -> None:
    """Of a clone, what the tests of some families need.

    Args:
        common: instead of the clone's ``tests/test_modeling_common.py``.

    Raises:
        ValueError: the clone lacks the tests of a family.
    """

    def unused(at: str, names: list[str]) -> list[str]:
        others = [n for n in names if "." not in n and n not in families]
        return others if Path(at).name == "models" else ["__pycache__"]

    for family in families:
        if not _tests_of(clone, family).exists():
            raise ValueError(
                f"a clone of transformers must have {_tests_of(Path(), family)} (an sdist has "
                f"not), got {clone}"
            )
    for part in ("tests", "utils"):  # tests of configurations import the latter
        if (clone / part).is_dir():
            shutil.copytree(clone / part, folder / part, ignore=unused)
    if common is not None:
        shutil.copyfile(common, folder / "tests" / "test_modeling_common.py")
    for file, name in UNUSED.items():
        (folder / "tests" / file).write_text(f"class {name}:\n    pass\n")


def run(
    folder: Path, tests: list[str], attention: str = "ours", backend: str = "auto"
) -> tuple[str, dict[str, dict]]:
    """transformers' version, and the outcome of every test by its name.

    Args:
        folder: of :func:`copied`.
        tests: files, or names of single tests.
        attention: "ours" or "stock", instead of SDPA and FlashAttention.
        backend: of ours.

    Raises:
        RuntimeError: the tests could not be run.
    """
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    path = os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", ""), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "swapped_attention", "-p",
            "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder, "-c", os.devnull,
            "-W", "ignore", "--tb=short", f"--attention={attention}", f"--backend={backend}",
            f"--outcomes={outcomes}", *tests,
        ],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (folder / f"{attention}.log").write_text(done.stdout + done.stderr)
    if done.returncode not in (0, 1) or not outcomes.exists():
        raise RuntimeError(
            f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr}"
        )
    found = json.loads(outcomes.read_text())
    return found["transformers"], found["tests"]


def row(family: str, tests: dict[str, dict], stock: dict[str, dict]) -> dict:
    """The counts of a family.

    Args:
        tests: outcomes with ours.
        stock: outcomes of those that failed, with torch's SDPA.
    """
    groups: dict[str, Counter] = {}
    skips: Counter = Counter()
    failures = []
    for name, one in tests.items():
        outcome = one["outcome"]
        if outcome == "passed" and not one["calls"]:
            outcome = "passed without attention"
        groups.setdefault(one["group"], Counter())[outcome] += 1
        if outcome == "skipped":
            skips[one["reason"]] += 1
        if outcome == "failed":
            too = stock.get(name, {}).get("outcome") == "failed"
            failures.append(
                {"test": name, "reason": one["reason"], "fails with stock SDPA too": too}
            )
    return {
        "family": family,
        "groups": {name: dict(sorted(groups[name].items())) for name in sorted(groups)},
        "failures": failures,
        "skips": dict(sorted(skips.items())),
        "calls of attention": sum(one["calls"] for one in tests.values()),
    }


def total(rows: list[dict]) -> Counter:
    return sum((Counter(counts) for r in rows for counts in r["groups"].values()), Counter())


def show(found: dict) -> None:
    for one in found["families"]:
        parts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(total([one]).items()))
        print(f"{one['family']}: {parts}; {one['calls of attention']} calls")
        for failure in one["failures"]:
            also = " (with stock SDPA too)" if failure["fails with stock SDPA too"] else ""
            print(f"  failed{also}: {failure['test']}\n    {failure['reason']}")
    print(f"transformers {found['transformers']}: {dict(total(found['families']))}")


def _tests_of(folder: Path, family: str) -> Path:
    return folder / "tests" / "models" / family / f"test_modeling_{family}.py"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--common", type=Path, help="test_modeling_common.py of another release")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--note", default="", help="what the sources are, for the file")
    parser.add_argument("--path", type=Path, default=PATH)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    if options.save and not options.note:
        parser.error("--save needs --note: the file says what the sources are")

    ours = 0  # failures that are our doing
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copied(options.clone.absolute(), options.common, folder, options.families)
        for family in options.families:
            file = str(_tests_of(folder, family))
            version, tests = run(folder, [file], "ours", options.backend)
            failed = [name for name, one in tests.items() if one["outcome"] == "failed"]
            stock = run(folder, failed, "stock")[1] if failed else {}
            found = {
                "transformers": version,
                "sources": options.note,
                "torch": torch.__version__,
                "gqa-kernels": gqa_kernels.__version__,
                "backend": options.backend,
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "families": [row(family, tests, stock)],
            }
            show(found)
            ours += sum(
                not f["fails with stock SDPA too"] for f in found["families"][0]["failures"]
            )
            if options.save:
                save(found, options.path)
    return int(ours > 0)


def save(found: dict, path: Path) -> None:
    """Write the one family of ``found``, and keep the others that the file has."""
    rows = {}
    if path.exists():
        rows = {one["family"]: one for one in json.loads(path.read_text())["families"]}
    rows |= {one["family"]: one for one in found["families"]}
    kept = [rows[name] for name in FAMILIES if name in rows]
    path.write_text(json.dumps({**found, "families": kept}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
