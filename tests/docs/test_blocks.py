"""Every Python block of the documentation and every example of a public docstring runs."""

import doctest
import importlib
import inspect
import re

import pytest
import torch
import torch.distributed as dist

import gqa_kernels

from .pages import PAGES, ROOT, blocks

# Code that is not marked as Python is another library's, or needs several machines.
RUN = [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page)]
NEEDS = {  # modules that a page's code imports
    "docs/transformers.md": "transformers",
    "docs/tutorials/compress.md": "transformers",
    "docs/tutorials/serve.md": "transformers",
}
SYMBOL = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
SYMBOLS = sorted(
    {name for page in (ROOT / "docs/api").glob("*.md") for name in SYMBOL.findall(page.read_text())}
)


@pytest.fixture
def one_rank():
    """The process group that docs/distributed.md takes for granted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run(page, request, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], minversion="5.23")
    if page == "docs/distributed.md":
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks(ROOT / page):
        exec(compile(block, page, "exec"), names)


def public(name):
    """The object that mkdocstrings shows under a name."""
    module, attributes = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                pytest.skip(str(error))
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def test_the_reference_has_every_public_name():
    missing = {f"gqa_kernels.{name}" for name in gqa_kernels.__all__} - {*SYMBOLS}
    assert missing == {"gqa_kernels.__version__"}


def examples(name):
    docstring = inspect.getdoc(public(name)) or ""
    return doctest.DocTestParser().get_doctest(docstring, {}, name, None, 0)


@pytest.mark.parametrize("name", SYMBOLS)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    test = examples(name)
    if not test.examples:
        assert name in WITHOUT_EXAMPLE, f"{name} needs an example in its docstring"
        return
    assert name not in WITHOUT_EXAMPLE
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    log = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(test, out=log.append)
    assert not log, "".join(log)


# They need a checkpoint, several processes or another library: the guides show them.
WITHOUT_EXAMPLE = set()
