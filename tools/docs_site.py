"""Hooks of mkdocs: pages of the site that lie outside ``docs/``.

The kernels' text lies beside the kernels, results beside their JSON, and so on; each is written
once. :data:`PAGES` names the page that each becomes. Source files that a page links become pages
below ``source/``, so that a link that works in a checkout works on the site.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))  # mkdocs loads this file alone
from tools.messages import page as messages_page

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
PAGES = {
    "csrc/README.md": "kernels/index.md",
    "csrc/cuda/sm80/prefill/README.md": "kernels/sm80_prefill.md",
    "csrc/cuda/sm80/backward/README.md": "kernels/sm80_backward.md",
    "csrc/cuda/sm90/README.md": "kernels/sm90.md",
    "benchmarks/README.md": "benchmarks/harness.md",
    f"{RESULTS}/amd-epyc-2-threads/report.md": "benchmarks/amd-epyc-2-threads.md",
    f"{RESULTS}/grouping/mgm.md": "benchmarks/grouping.md",
    f"{RESULTS}/grouping/merging.md": "benchmarks/merging.md",
    f"{RESULTS}/grouping/search.md": "benchmarks/search.md",
    f"{RESULTS}/formats/smollm2.md": "benchmarks/formats.md",
    f"{RESULTS}/recovery/smollm2.md": "benchmarks/recovery.md",
    f"{RESULTS}/train-demo/report.md": "benchmarks/train_demo.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/README.md": "tests.md",
    "CHANGELOG.md": "changelog.md",
}
MESSAGES = "messages.md"  # made by tools/messages.py
LANGUAGES = {
    ".py": "python", ".h": "cpp", ".cuh": "cpp", ".cpp": "cpp", ".cu": "cpp", ".sh": "bash",
    ".json": "json", ".toml": "toml", ".yml": "yaml",
}  # fmt: skip
COPIED = (".svg", ".png", ".ipynb")  # as they are
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside ``docs/``, and the files that pages link."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, page in PAGES.items():
        texts[path] = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[path]))
    files.append(File.generated(config, MESSAGES, content=messages_page()))
    linked = {target for path, text in texts.items() for target in linked_files(path, text)}
    for target in sorted(linked):
        if site_page(target).startswith("source/"):
            files.append(_linked_file(config, target))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them."""
    uri = page.file.src_uri
    if uri.startswith("source/") or uri == MESSAGES:
        return markdown
    written_at = {page: path for path, page in PAGES.items()}
    return with_site_links(written_at.get(uri, f"docs/{uri}"), uri, markdown)


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Docstrings in Markdown: they use the roles and the ``::`` of reStructuredText."""
    html = re.sub(r":(?:class|func|meth|mod|attr|data):(?=<code>)", "", html)
    html = re.sub(r"<code>~(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
    return re.sub(r"::(?=</p>)", ":", html)


def linked_files(path: str, text: str) -> set[str]:
    """Files of the repository that a page at ``path`` links, from the repository's root."""
    prose = FENCE.sub("", text)
    found = {_resolve(path, target) for _, target, _ in LINK.findall(prose)}
    return {target for target in found if _exists(target)}


def with_site_links(path: str, uri: str, text: str) -> str:
    """The text of the page ``uri``, written at ``path``, with links between pages of the site."""

    def replaced(match: re.Match[str]) -> str:
        target = _resolve(path, match[2])
        if not _exists(target):
            return match[0]  # mkdocs reports a broken link
        place = posixpath.relpath(site_page(target), posixpath.dirname(uri) or ".")
        return f"{match[1]}{place}{match[3]}"

    parts = FENCE.split(text)
    return "".join(part if FENCE.match(part) else LINK.sub(replaced, part) for part in parts)


def site_page(target: str) -> str:
    """The page or file of the site that shows a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}" if target.endswith(COPIED) else f"source/{target}.md"


def _exists(target: str) -> bool:
    return not target.startswith("..") and (ROOT / target).exists()


def _resolve(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _linked_file(config: MkDocsConfig, target: str) -> File:
    path, page = ROOT / target, site_page(target)
    if target.endswith(COPIED):
        return File.generated(config, page, abs_src_path=str(path))
    if path.is_dir():
        kind, text = (
            "text",
            "\n".join(sorted(x.name for x in path.iterdir() if x.name[0] not in "_.")),
        )
    else:
        kind, text = LANGUAGES.get(path.suffix, "text"), path.read_text(encoding="utf-8")
    head = f"---\nsearch:\n  exclude: true\ntitle: {target}\n---\n\n# {target}\n\n"
    return File.generated(config, page, content=f"{head}`````{kind}\n{text}\n`````\n")
