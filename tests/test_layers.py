"""Imports go down: a module imports its own layer or lower ones, and no circle, lazy imports
counted. The layers are those of the design."""

import ast
from pathlib import Path

import gqa_kernels

ROOT = Path(gqa_kernels.__file__).parent
PUBLIC = "attention cascade decode explain flash_attn keep public sdpa testing varlen write"

# Top first. A name is a module or a package; a module belongs to the longest name that it is in.
LAYERS = (
    "cli demo train_demo samples __main__",
    "integrations",
    "convert parallel",
    "integrations.transformers integrations.engine_layer nn",
    f"{PUBLIC} __init__",
    "grouping backends",
    "call models",
    "native cache",
    "head_map partition reporting version native.env native.arguments integrations.__init__",
)
LAYER_OF = {name: i for i, names in enumerate(reversed(LAYERS)) for name in names.split()}


def modules() -> dict[str, Path]:
    """Every module by its name within the package; a package by its own name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = modules()


def imports_of(name: str) -> dict[str, int]:
    """Modules of the package that a module imports anywhere, with a line."""
    path, found = MODULES[name], {}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module or "").split(".")] if node.module else base
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gqa_kernels"):
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            full = ".".join([*base, alias.name])
            target = full if full in MODULES else ".".join(base) or "__init__"
            if target in MODULES and target != name:
                found.setdefault(target, node.lineno)
    return found


IMPORTS = {name: imports_of(name) for name in MODULES}


def layer(name: str) -> int:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LAYER_OF:
            return LAYER_OF[".".join(parts[:end])]
    raise AssertionError(f"{name} is in no layer: the root holds public modules only")


def test_imports_go_down():
    up = [
        f"{name}:{line} imports {target}, a layer above"
        for name, targets in IMPORTS.items()
        for target, line in targets.items()
        if layer(target) > layer(name)
    ]
    assert not up, "\n".join(up)


def test_no_circles():
    """Tarjan's strongly connected components: each must be one module."""
    index, low, stack, circles = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in IMPORTS[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for name in MODULES:
        if name not in index:
            visit(name)
    assert not circles, circles


def test_the_root_holds_public_modules_only():
    here = {path.stem for path in ROOT.glob("*.py")}
    assert here == {*PUBLIC.split(), "__init__", "__main__", "head_map", "version"}
