"""The site: its menu lists every page, and every link between pages has a target."""

import re

import pytest

from .pages import ROOT

pytest.importorskip("mkdocs")
from tools import docs_site


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]))
    written = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    added = set(docs_site.PAGES.values()) | {docs_site.MESSAGES}
    assert menu == written | added


def test_links_become_the_sites():
    text = (
        "[a](../csrc/README.md#x) [b](../gqa_kernels/head_map.py) [c](faq.md) [d](https://x.org)\n"
        "```\n[e](faq.md)\n```\n[f](nowhere.md)"
    )
    assert docs_site.linked_files("docs/api/x.md", "[b](../../LICENSE)") == {"LICENSE"}
    assert docs_site.with_site_links("docs/x.md", "x.md", text) == (
        "[a](kernels/index.md#x) [b](source/gqa_kernels/head_map.py.md) [c](faq.md) "
        "[d](https://x.org)\n```\n[e](faq.md)\n```\n[f](nowhere.md)"
    )


def test_docstrings_lose_the_marks_of_restructured_text():
    html = "<p>a :class:<code>~gqa_kernels.HeadMap</code>, :func:<code>x.search</code> as::</p>"
    shown = docs_site.on_page_content(html, None, None, None)
    assert shown == "<p>a <code>HeadMap</code>, <code>x.search</code> as:</p>"


def test_pages_outside_docs_exist():
    for path in docs_site.PAGES:
        assert (ROOT / path).exists(), path
