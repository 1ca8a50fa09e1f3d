"""The pages of the documentation and their code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(
    path
    for folder in (".", "docs", "benchmarks", "csrc", "tests")
    for path in (ROOT / folder).glob("**/*.md" if folder in ("csrc", "docs") else "*.md")
)


def blocks(page: Path, kinds: tuple[str, ...] = ("python",)) -> list[str]:
    """The code of a page in some languages; ``""`` is a block that names none."""
    return [code for kind, code in FENCED.findall(page.read_text()) if kind in kinds]
