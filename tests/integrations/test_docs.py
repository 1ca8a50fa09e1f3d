"""The code of docs/distributed.md runs, block after block; what docs/engines.md names exists."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_run(one_rank):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "distributed.md").read_text(), re.S):
        exec(compile(block, "docs/distributed.md", "exec"), names)
    assert names["shard"].query_heads and names["out"].shape == (4, 32, 16, 64)


def test_named_modules_exist():
    text = "".join((DOCS / name).read_text() for name in ("distributed.md", "engines.md"))
    named = re.findall(r"gqa_kernels(?:\.[a-z_]+)+", text)
    assert named
    for name in named:
        parent, _, last = name.rpartition(".")
        assert hasattr(import_module(parent), last) or find_spec(name), name
