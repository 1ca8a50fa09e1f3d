"""A machine for tests of the build at first use: an empty cache, a compiler, and processes.

The compiler is a stand-in: it logs its calls, takes as long or fails as it should, and links by
copying a library that was built before.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
case "$*" in *--version) exec echo stand-in 1.0;; esac
echo "$*" >> {log}
[ -n {failure} ] && {{ echo {failure} >&2; exit 1; }}
sleep {seconds}
from=/dev/null
case "$*" in *" -shared "*) from={library};; esac
while [ "$1" != -o ]; do shift; done
exec cp "$from" "$2"
"""
# No library built ahead of time: a checkout may have one beside its sources.
BEFORE = "from gqa_kernels.native import build\nbuild.LIBRARY = 'none'\n"
CALL = """
import torch, warnings
from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.testing import assert_attention_close, make_inputs
head_map = HeadMap([0, 1, 1])
q, k, v = make_inputs(1, head_map, 3, 40, 16)
out = asym_gqa_attention(q, k, v, head_map, backend="{backend}")
assert_attention_close(out, q, k, v, head_map)
"""


class Machine:
    def __init__(self, folder: Path, library: Path):
        self.cache = folder / "cache"
        self.log = folder / "compiler.log"
        self.script = folder / "c++"
        self.library = library

    def compiler(self, failure: str = "", seconds: float = 0.0) -> str:
        words = {"log": str(self.log), "failure": failure, "library": str(self.library)}
        words = {name: shlex.quote(word) for name, word in words.items()}
        self.script.write_text(STAND_IN.format(seconds=seconds, **words))
        self.script.chmod(0o755)
        return str(self.script)

    def start(self, code: str, new_session: bool = False, **env: str) -> subprocess.Popen:
        # The cache falls back to the folder of temporary files, which must be this machine's own.
        temporary = self.cache.with_name("temporary")
        temporary.mkdir(exist_ok=True)
        own = {"GQA_KERNELS_CACHE": str(self.cache), "TMPDIR": str(temporary)}
        environment = {**os.environ, **own, **env}
        return subprocess.Popen(
            [sys.executable, "-c", BEFORE + code], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=new_session,
        )  # fmt: skip

    def run(self, code: str, **env: str) -> tuple[str, str]:
        process = self.start(code, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, err

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def libraries(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("*.so"))
