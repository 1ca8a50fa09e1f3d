"""The modules that docs/distributed.md and docs/engines.md name exist."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_named_modules_exist():
    text = "".join((DOCS / name).read_text() for name in ("distributed.md", "engines.md"))
    named = re.findall(r"gqa_kernels(?:\.[a-z_]+)+", text)
    assert named
    for name in named:
        parent, _, last = name.rpartition(".")
        assert hasattr(import_module(parent), last) or find_spec(name), name
