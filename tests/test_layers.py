"""Imports go down the layers, never up, and never in a circle; lazy imports count."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "gqa_kernels"
PUBLIC = "public functions"
LAYERS = (  # from the top; a module imports its own layer and lower ones
    ("__main__", "cli", "demo", "train_demo", "samples"),
    (
        "integrations.vllm",
        "integrations.sglang",
        "integrations.kvpress",
        "integrations.hf_kernels",
        "integrations.engine_layer",
    ),
    ("convert", "parallel"),
    ("integrations.transformers", "nn"),
    (PUBLIC,),
    ("grouping", "backends"),
    ("call", "models"),
    ("native", "cache"),
    ("head_map", "partition", "reporting", "env", "version"),
)
TEMPLATES = ("integrations/hf_kernels/entry.py",)  # copied, not imported
# Modules that wait for their place (issue 18). Delete an entry when its last import goes down.
WAITING = {
    "arguments", "autograd", "dropout", "inputs", "ops", "plan", "splits", "backends.plain",
    "cache.base", "cache.decode", "cache.inputs", "cache.view",
}  # fmt: skip
CIRCLES = (  # likewise
    {"backends.base", "backends.plain", "cache.inputs", "cache.view", "native.build", "ops"},
    {"backends.reference", "backends.reference.cache"},
)


@cache
def modules() -> dict[str, Path]:
    """Files by dotted name below the package; the package itself is ``""``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE)
        if name.as_posix() not in TEMPLATES:
            parts = name.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """The package's modules that each module imports, anywhere in its code."""
    return {name: set(_imported(name, path)) for name, path in modules().items()}


def _imported(name: str, path: Path):
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            base = package[: len(package) - node.level + 1] + base
        elif base[:1] == [PACKAGE]:
            base = base[1:]
        else:
            continue
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            target = inner if inner in modules() else ".".join(base)
            if target != name:
                yield target


def layer(module: str) -> int | None:
    """Index into LAYERS, None if the module has no place there."""
    parts = module.split(".")
    for depth in (2, 1):
        for index, names in enumerate(LAYERS):
            if ".".join(parts[:depth]) in names:
                return index
    return next(i for i, names in enumerate(LAYERS) if PUBLIC in names) if len(parts) == 1 else None


def waits(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in WAITING)


def test_imports_go_down():
    up = []
    for module, targets in imports().items():
        for target in targets:
            if not module or waits(module) or waits(target) or module == "integrations":
                continue
            if layer(module) is None or layer(target) is None or layer(target) < layer(module):
                up.append(f"{module} -> {target}")
    assert not up


def test_no_circles():
    found = [circle for circle in circles(imports()) if not any(circle <= c for c in CIRCLES)]
    assert not found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of two or more modules (Tarjan)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_no_code_file_over_500_lines():
    long = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {n: lines for n, lines in long.items() if lines > 500 and not waits(n)}
