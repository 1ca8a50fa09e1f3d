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


# Their examples need a model, several processes or another library. The guides run such code.
NOT_RUN = {
    "gqa_kernels.convert.convert",
    "gqa_kernels.convert.evaluation.evaluate",
    "gqa_kernels.convert.load",
    "gqa_kernels.convert.plan.plan",
    "gqa_kernels.convert.prune_heads",
    "gqa_kernels.convert.recovery.recover",
    "gqa_kernels.convert.save",
    "gqa_kernels.convert.select_maps",
    "gqa_kernels.grouping.Dissimilarity",
    "gqa_kernels.grouping.calibrate",
    "gqa_kernels.grouping.layer_errors",
    "gqa_kernels.grouping.merge_layer",
    "gqa_kernels.grouping.similarity",
    "gqa_kernels.integrations.kvpress.PressedCache",
    "gqa_kernels.integrations.transformers.PagedCache",
    "gqa_kernels.integrations.transformers.continuous_batching",
    "gqa_kernels.integrations.transformers.register",
    "gqa_kernels.parallel.context.context_parallel_attention",
    "gqa_kernels.parallel.context.context_parallel_decode",
    "gqa_kernels.parallel.dtensor.register",
    "gqa_kernels.parallel.shard_checkpoint.load_shard",
    "gqa_kernels.parallel.shard_checkpoint.shard_checkpoint",
    "gqa_kernels.parallel.tensor.shard_model",
    "gqa_kernels.parallel.ulysses.ulysses_attention",
}


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
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except ImportError as error:
        pytest.skip(str(error))


def test_the_reference_has_every_public_name():
    missing = {f"gqa_kernels.{name}" for name in gqa_kernels.__all__} - {*SYMBOLS}
    assert missing == {"gqa_kernels.__version__"}


def examples(name):
    docstring = inspect.getdoc(public(name)) or ""
    return doctest.DocTestParser().get_doctest(docstring, {}, name, None, 0)


@pytest.mark.parametrize("name", SYMBOLS)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    test = examples(name)
    assert test.examples, f"{name} needs an example in its docstring"
    if name in NOT_RUN:
        for example in test.examples:
            compile(example.source, name, "exec")
        return
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    log = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(test, out=log.append)
    assert not log, "".join(log)
