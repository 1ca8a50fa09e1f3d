"""The code of docs/caches.md runs, block after block."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()


def test_blocks_run():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/caches.md", "exec"), names)
    assert names["lengths"].tolist() == [7, 7]
    assert names["prompt"] in names["allocator"].sequences
