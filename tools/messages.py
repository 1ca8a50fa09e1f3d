"""Every error message and warning of the package, read from its source.

``tools/docs_site.py`` makes the documentation's page of messages from this. A test checks that the
troubleshooting page explains those that need it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gqa_kernels"
VALUE = "…"  # in place of what a message fills in


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: the exception's name, or ``"warning"``.
        text: with ``VALUE`` in place of values.
        path: of the module, below ``gqa_kernels``.
    """

    kind: str
    text: str
    path: str

    @property
    def states_rule(self) -> bool:
        """Whether it names a rule that the caller can follow: ``x must ..., got ...``."""
        return " must " in self.text

    @property
    def quote(self) -> str:
        """The beginning of its longest part without a value."""
        return max((part.strip() for part in self.text.split(VALUE)), key=len)[:60]


def messages() -> list[Message]:
    """In the order of the modules, each once."""
    found: dict[Message, None] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        for kind, argument in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            text = re.sub(r"\s+", " ", _text(argument)).strip()
            if re.search("[a-z]{4}", text) and "has no attribute" not in text:
                found[Message(kind, text, module)] = None
    return list(found)


def _raised(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Kind and first argument of each raise and each warning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield ast.unparse(node.exc.func), node.exc.args[0]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            yield "warning", node.args[0]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return VALUE


def page() -> str:
    """All messages as a Markdown page."""
    lines = [
        "# Every message",
        "",
        "All errors and warnings of the package, by module, read from its source. "
        f"{VALUE} is a value. Most say what an argument *must* be and what it is: change the "
        "argument. [Troubleshooting](troubleshooting.md) explains the others.",
    ]
    area = ""
    for message in messages():
        top = message.path.split("/")[0]
        if top != area:
            area = top
            lines += ["", f"## {area.removesuffix('.py')}", "", "| message | kind |", "|---|---|"]
        text = message.text.replace("|", "\\|").replace("`", "'")
        lines.append(f"| `{text}` | {message.kind} |")
    return "\n".join(lines) + "\n"
