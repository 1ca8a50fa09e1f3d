"""The package as a kernel repository: loaded by ``kernels``, and into transformers."""

import importlib.util
import json
import re
import sys
from base64 import b64encode
from hashlib import sha256

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import hub_kernels

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.integrations.hf_kernels import BACKENDS, build
from gqa_kernels.integrations.hf_kernels.__main__ import main
from gqa_kernels.integrations.transformers import register
from gqa_kernels.testing import make_inputs
from tests.integrations.test_transformers import CLOSE, logits
from tests.tiny_models import batch, expanded, split, tiny

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="kernels is not installed"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hub") / "asym-gqa")


@pytest.fixture
def kernel(repository, monkeypatch):
    """What ``kernels`` does: the folder's ``__init__.py`` under the id of the metadata."""
    monkeypatch.setenv("GQA_KERNELS_BUILD", "0")  # its C++ would be compiled again
    folder = repository / "build" / "torch-cpu"
    identity = json.loads((folder / "metadata.json").read_text())["id"]
    if identity not in sys.modules:
        spec = importlib.util.spec_from_file_location(identity, folder / "__init__.py")
        sys.modules[identity] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[identity])
    return sys.modules[identity]


def test_layout(repository):
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "build"]
    for backend in BACKENDS:
        folder = repository / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["id"].isidentifier() and metadata["backend"]["type"] == backend
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        hashes = metadata["digest"]["files"]
        assert files == hashes.keys() | {"metadata.json"}
        for name, found in hashes.items():
            assert found == b64encode(sha256((folder / name).read_bytes()).digest()).decode()
        assert (folder / "core" / "_csrc" / "bindings.cpp").is_file() == (backend == "cpu")
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert "torch.ops.gqa_kernels" not in text and "gqa_kernels::" not in text, path
            # In an example of a docstring, "from gqa_kernels" follows ">>>".
            assert not re.search(r"^\s*(import|from) gqa_kernels", text, re.MULTILINE), path


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_beside_the_package(kernel):
    """Its ops live in a namespace of their own; the Triton op, the one that Python defines."""
    head_map = HeadMap([0, 2, 0, 1])
    q, k, v = make_inputs(1, head_map, 5, 7, 16)
    expected = asym_gqa_attention(q, k, v, head_map, causal=True, backend="reference")
    for backend in ("auto", "triton"):
        out = kernel.asym_gqa_attention(q, k, v, list(head_map), causal=True, backend=backend)
        torch.testing.assert_close(out, expected)
    assert hasattr(getattr(torch.ops, kernel.__name__), "triton_attention_forward")
    assert kernel.HeadMap is not HeadMap


@pytest.mark.parametrize("name", ["org/asym-gqa", "org/asym-gqa:flash_attn_forward"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_takes_it(kernel, monkeypatch, name, family):
    """Through the look-up of ``attn_implementation="org/repo"``, with masks of either kind."""
    register()
    loader = getattr(hub_kernels, "load_and_register_attn_kernel", None)
    if loader is None:
        pytest.skip("this transformers loads kernels otherwise")
    module = kernel
    if ":" in name:  # releases that don't look for flash_attn_forward by themselves
        module = type("Kernel", (), {"flash_attn_forward": staticmethod(kernel.flash_attn_forward)})
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: module)
    window = {"sliding_window": 6} if family == "mistral" else {}
    model = split(tiny(family, **window), num_kv_heads=4)
    try:
        loader(name)
        model.config._attn_implementation = name
        for side in ("left", "right"):
            inputs = batch([9, 4], side)
            torch.testing.assert_close(
                logits(model, inputs), logits(expanded(model), inputs), **CLOSE
            )
        options = {"max_new_tokens": 4, "do_sample": False}
        inputs = batch([9, 4], "left")
        ours, theirs = (m.generate(**inputs, **options) for m in (model, expanded(model)))
        assert ours.tolist() == theirs.tolist()
        row, positions = batch([9], "left")["input_ids"], torch.arange(9)[None] % 5  # packed
        with torch.no_grad():
            ours = model(row, position_ids=positions, use_cache=False).logits
            theirs = [expanded(model)(part, use_cache=False).logits for part in row.split(5, 1)]
        torch.testing.assert_close(ours, torch.cat(theirs, 1), **CLOSE)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


@needs_kernels
def test_kernels_loads_it(repository, monkeypatch):
    from kernels import get_local_kernel

    monkeypatch.setenv("GQA_KERNELS_BUILD", "0")
    loaded = get_local_kernel(repository, backend="cpu")
    q, k, v = make_inputs(1, HeadMap([1, 0, 1]), 3, 4, 8)
    out = loaded.asym_gqa_attention(q, k, v, [1, 0, 1])
    torch.testing.assert_close(out, asym_gqa_attention(q, k, v, [1, 0, 1], backend="reference"))


def test_command_and_errors(tmp_path, capsys):
    with pytest.raises(ValueError, match="folder must not exist or be empty"):
        (tmp_path / "file").write_text("")
        build(tmp_path)
    assert main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
