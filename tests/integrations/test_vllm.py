"""vLLM's batches over its paged cache, and registration. `tests/engine` has a real vLLM."""

import os
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.integrations import vllm as integration
from gqa_kernels.integrations.engine_layer import Layer
from gqa_kernels.integrations.vllm.attention import Batch, cached_attention
from gqa_kernels.integrations.vllm.pages import PER_TOKEN_HEAD, Pages, slot_bytes
from tests.integrations import fake_vllm
from tests.integrations.stand_ins import stand_in

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

HEAD_MAP = HeadMap([0, 2, 0, 1, 0])  # 5 query heads over 3 KV heads
HEAD_SIZE = 16
BLOCK_SIZE = 16
ROOT = Path(__file__).parents[2]


def pages(head_size_v: int = HEAD_SIZE, **how) -> Pages:
    heads = HEAD_MAP.num_kv_heads
    return Pages((heads, heads), (HEAD_SIZE, head_size_v), **how)


def layer(**options) -> Layer:
    return Layer(HEAD_MAP, HEAD_SIZE**-0.5, **options)


class Engine:
    """Requests of growing length in a cache as vLLM has it: what a model runner keeps."""

    def __init__(self, num_requests: int, head_size_v: int = HEAD_SIZE, nhd: bool = True):
        torch.manual_seed(0)
        blocks, heads = 4 * num_requests + 1, HEAD_MAP.num_kv_heads
        shape = (blocks, BLOCK_SIZE, heads, HEAD_SIZE + head_size_v)
        self.kv_cache = torch.full(shape, torch.nan).transpose(1, 2)
        if not nhd:
            self.kv_cache = self.kv_cache.contiguous()
        self.block_table = torch.randperm(blocks - 1).view(num_requests, 4).int()
        self.keys = [torch.zeros(0, heads, HEAD_SIZE) for _ in range(num_requests)]
        self.values = [torch.zeros(0, heads, head_size_v) for _ in range(num_requests)]

    def step(self, new_tokens: list[int], padding: int = 0) -> tuple[Batch, tuple]:
        """The batch of a step; query, key and value of its tokens, padded as CUDA graphs do."""
        total = sum(new_tokens) + padding
        query = torch.randn(total, HEAD_MAP.num_heads, HEAD_SIZE)
        key = torch.randn(total, *self.keys[0].shape[1:])
        value = torch.randn(total, *self.values[0].shape[1:])
        begins = torch.tensor([0, *new_tokens]).cumsum(0)
        old = torch.tensor([len(k) for k in self.keys], dtype=torch.int32)
        for r, (begin, end) in enumerate(pairwise(begins.tolist())):
            self.keys[r] = torch.cat([self.keys[r], key[begin:end]])
            self.values[r] = torch.cat([self.values[r], value[begin:end]])
        lens = torch.tensor([len(k) for k in self.keys], dtype=torch.int32)
        batch = Batch(
            total, max(new_tokens), begins.int(), lens, old, self.block_table, causal=True
        )
        return batch, (query, key, value)

    def expected(self, batch: Batch, query: torch.Tensor, **options) -> torch.Tensor:
        """Each request by itself, over its keys so far."""
        outs = []
        for r, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            q = query[batch.query_start_loc[r] : batch.query_start_loc[r + 1]]
            out = asym_gqa_attention(
                q[None], k[None], v[None], HEAD_MAP, causal=True, layout="bshd",
                backend="reference", **options,
            )  # fmt: skip
            outs.append(out[0])
        return torch.cat(outs)


@pytest.mark.parametrize("nhd", [True, False], ids=["NHD", "HND"])
@pytest.mark.parametrize("head_size_v", [HEAD_SIZE, 8])
def test_prefill_then_mixed_then_decode(nhd, head_size_v):
    engine = Engine(3, head_size_v, nhd)
    for new_tokens in ([20, 1, 7], [1, 13, 0], [1, 1, 1]):
        batch, tensors = engine.step(new_tokens)
        out = cached_attention(layer(), pages(head_size_v), batch, *tensors, engine.kv_cache)
        torch.testing.assert_close(out, engine.expected(batch, tensors[0]))


def test_options_and_shared_caches():
    engine = Engine(2)
    options = {"softcap": 2.0, "alibi_slopes": torch.rand(5), "sinks": torch.randn(5)}
    batch, tensors = engine.step([9, 18])
    this = layer(window=4, **options)
    expected = engine.expected(batch, tensors[0], window=(4, None), **options)
    torch.testing.assert_close(
        cached_attention(this, pages(), batch, *tensors, engine.kv_cache), expected
    )
    # A layer that shares the cache of another one writes nothing.
    before = engine.kv_cache.clone()
    again = cached_attention(this, pages(), batch, tensors[0], None, None, engine.kv_cache)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(engine.kv_cache, before, equal_nan=True)


def test_padded_tokens_and_requests():
    """Tokens beyond the last request, and requests without tokens: neither read nor written."""
    engine = Engine(3)
    batch, tensors = engine.step([5, 2, 0], padding=4)
    out = cached_attention(layer(), pages(), batch, *tensors, engine.kv_cache)
    torch.testing.assert_close(out[:7], engine.expected(batch, tensors[0]))
    assert int(engine.kv_cache.isfinite().all(-1).all(1).sum()) == 7


def test_fp8_cache():
    engine = Engine(2)
    fp8 = torch.zeros(engine.kv_cache.shape, dtype=torch.uint8)
    scales = {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(0.25)}
    batch, tensors = engine.step([20, 3])
    how = pages(storage=torch.float8_e4m3fn)
    out = cached_attention(layer(), how, batch, *tensors, fp8, scales=scales)

    def stored(x, scale):
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    engine.keys = [stored(k, scales["k_scale"]) for k in engine.keys]
    engine.values = [stored(v, scales["v_scale"]) for v in engine.values]
    torch.testing.assert_close(out, engine.expected(batch, tensors[0]))


def test_layers_share_the_plan_of_a_step():
    """Only those with the same map and options do."""
    engine = Engine(2)
    batch, tensors = engine.step([3, 4])
    for this in (layer(), layer(), layer(softcap=2.0)):
        cached_attention(this, pages(), batch, *tensors, engine.kv_cache)
    assert len(batch.plans) == 2


@pytest.mark.parametrize("heads", [(3, 3), (3, 2), (1, 3)])
@pytest.mark.parametrize("name", ["auto", "int8_per_token_head", "int4_per_token_head"])
def test_pages(heads, name):
    """Views of K, V and scales cover each byte of a cell once."""
    format = PER_TOKEN_HEAD.get(name)
    together = heads[0] == heads[1]
    dtype = torch.float32 if format is None else format.storage
    cells = heads[0] if together else 1
    content = slot_bytes(name, dtype, (1, 1) if together else heads, (HEAD_SIZE, 8))
    memory = torch.zeros(2, cells, BLOCK_SIZE, content // dtype.itemsize, dtype=dtype)
    how = Pages(heads, (HEAD_SIZE, 8), None if format is None else dtype, format)
    k, v, scales = how.split(memory, heads)
    per_byte = 1 if format is None else format.per_byte
    assert k.shape == (2, heads[0], BLOCK_SIZE, HEAD_SIZE // per_byte)
    assert v.shape == (2, heads[1], BLOCK_SIZE, 8 // per_byte)
    zeros = {"k_zero", "v_zero"} if name.startswith("int4") else set()
    assert set(scales) == (set() if format is None else {"k_scale", "v_scale"} | zeros)
    for view in (k, v, *scales.values()):
        assert not view.any()  # no view before it wrote here
        view.fill_(1)
    assert memory.all() if format is None else memory.view(torch.uint8).any(-1).all()
    sizes = sum(x.numel() * x.element_size() for x in (k, v, *scales.values()))
    assert sizes == memory.numel() * memory.element_size()


@pytest.mark.parametrize("stored", [(4, 4), (5, 4)])
def test_blocks_with_more_heads_than_the_layer(stored):
    """As of a rank of tensor parallelism, if another one holds more. Nothing touches the rest."""
    engine = Engine(2)
    cells = (stored[0], 2 * HEAD_SIZE) if stored[0] == stored[1] else (1, sum(stored) * HEAD_SIZE)
    memory = torch.full((9, cells[0], BLOCK_SIZE, cells[1]), torch.nan)
    how = Pages(stored, (HEAD_SIZE, HEAD_SIZE))
    batch, tensors = engine.step([20, 3])
    out = cached_attention(layer(), how, batch, *tensors, memory)
    torch.testing.assert_close(out, engine.expected(batch, tensors[0]))
    assert int(memory.isfinite().sum()) == 23 * 2 * HEAD_MAP.num_kv_heads * HEAD_SIZE


def test_cells_of_whole_words():
    with pytest.raises(ValueError, match=r"whole 4-byte words .* got 14 bytes"):
        slot_bytes("int8_per_token_head", torch.int8, (1, 1), (7, 7))


def test_vllm_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ImportError, match=r"needs vllm >= 0\.32"):
        integration.register()


def test_vllm_too_old(monkeypatch):
    """It has the enumeration of backends, and no way into it."""
    stand_in(monkeypatch, "vllm.model_executor.models.registry", ModelRegistry=object)
    stand_in(monkeypatch, "vllm.platforms", current_platform=object)
    stand_in(
        monkeypatch, "vllm.v1.attention.backends.registry",
        AttentionBackendEnum=object, register_backend=object,
    )  # fmt: skip
    with pytest.raises(ImportError, match=r"needs vllm >= 0\.32: this one can't register"):
        integration.register()
    with pytest.warns(UserWarning, match=r"not registered with vLLM: .* can't register"):
        integration.plugin()  # which must not stop vLLM


def test_any_error_of_the_entry_point_is_a_warning(monkeypatch):
    monkeypatch.setattr(integration, "register", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="not registered with vLLM: division by zero"):
        integration.plugin()


def test_entry_points_lead_to_functions_that_never_raise():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        module, name = found[group]["asym_gqa"].split(":")
        assert name == "plugin" and callable(import_module(module).plugin)


class TestRegistered:
    """In processes of their own, with a package that stands in for vLLM."""

    def run(self, folder, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": f"{fake_vllm.write(folder)}{os.pathsep}{ROOT}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_a_spawned_engine_unpickles_its_config_before_plug_ins_load(self, tmp_path):
        config = tmp_path / "config"
        self.run(
            tmp_path,
            f"""
            import multiprocessing.reduction, pathlib
            from gqa_kernels.integrations import vllm as integration
            integration.register()
            integration.register()
            from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
            members = {{"ours": Backends["ASYM_GQA"], "theirs": Backends.FLASH_ATTN}}
            data = multiprocessing.reduction.ForkingPickler.dumps(members)
            pathlib.Path({str(config)!r}).write_bytes(data)
            """,
        )
        out = self.run(
            tmp_path,
            f"""
            import pathlib, pickle
            config = pickle.loads(pathlib.Path({str(config)!r}).read_bytes())
            from vllm.model_executor.models.registry import ModelRegistry
            from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
            assert config == {{"ours": Backends["ASYM_GQA"], "theirs": Backends.FLASH_ATTN}}
            print(config["ours"].get_class().__name__, *ModelRegistry.models)
            """,
        )
        assert out.split() == ["AsymGQABackend", *integration.ARCHITECTURES]

    def test_cpu_platform(self, tmp_path):
        """It always takes CPU_ATTN, which is ours just where the user asked for ours."""
        out = self.run(
            tmp_path,
            """
            from gqa_kernels.integrations import vllm as integration
            integration.register()
            from vllm.config import using
            from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
            uneven = {"kv_head_map": [[0, 0, 0, 1]], "architectures": ["LlamaForCausalLM"]}
            for backend, model in (
                (None, {}), (Backends.FLASH_ATTN, {}), (Backends["ASYM_GQA"], {}), (None, uneven),
            ):
                with using(backend, **model):
                    print(Backends.CPU_ATTN.get_class().__name__)
            print(Backends.CPU_ATTN.get_class().__name__)  # nothing is being built
            """,
        )
        theirs, ours = "CPUAttentionBackend", "AsymGQABackend"
        assert out.split() == [theirs, theirs, ours, ours, theirs]

    def test_head_counts_that_ranks_do_not_divide(self, tmp_path):
        """vLLM's check sees a multiple; what vLLM's own class has to say about a config stays."""
        out = self.run(
            tmp_path,
            """
            from gqa_kernels.integrations import vllm as integration
            integration.register()
            integration.register()
            from types import SimpleNamespace
            from vllm.model_executor.models.config import MODELS_CONFIG_MAP, ArchConfig
            for ranks in (1, 3, 4):
                model = SimpleNamespace(model_arch_config=ArchConfig(9))
                config = SimpleNamespace(
                    model_config=model,
                    parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
                )
                MODELS_CONFIG_MAP["AsymGQAGptOssForCausalLM"].verify_and_update_config(config)
                print(model.model_arch_config.total_num_attention_heads, config.changed_by)
            theirs = {"GptOssForCausalLM", "LlamaForCausalLM"}
            assert set(MODELS_CONFIG_MAP) == {*integration.ARCHITECTURES, *theirs}
            """,
        )
        assert out.splitlines() == ["9 vllm", "9 vllm", "12 vllm"]

    def test_a_model_class_that_ignores_the_maps(self, tmp_path):
        """Loaded under a stock architecture, an uneven child would compute equal groups.

        On any platform, whatever attention it chose: vLLM is stopped before it builds the model.
        """
        out = self.run(
            tmp_path,
            """
            from types import SimpleNamespace
            from gqa_kernels.integrations import vllm as integration
            integration.register()
            integration.register()
            from vllm.model_executor.models.config import MODELS_CONFIG_MAP
            for maps in ([[0, 0, 0, 1]], [[0, 0, 1, 1]], None):
                for name in ("LlamaForCausalLM", "GptOssForCausalLM"):
                    text = SimpleNamespace(kv_head_map=maps, architectures=[name])
                    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
                    try:
                        MODELS_CONFIG_MAP[name].verify_and_update_config(config)
                    except NotImplementedError as error:
                        print("stopped:", error)
                    else:
                        print(name, maps, getattr(config, "changed_by", None))
            from vllm.config import using
            from gqa_kernels.integrations.vllm.backend import AsymGQAImpl
            with using(kv_head_map=[[0, 0, 0, 1]], architectures=["LlamaForCausalLM"]):
                try:
                    AsymGQAImpl(4, 16, 1.0, 2)
                except NotImplementedError as error:
                    print(error)
            with using(kv_head_map=[[0, 0, 1, 1]]):
                AsymGQAImpl(4, 16, 1.0, 2)
            """,
        )
        assert "got ['LlamaForCausalLM'], which would compute equal groups" in out
        lines = out.splitlines()
        for line, name in zip(lines, ("LlamaForCausalLM", "GptOssForCausalLM"), strict=False):
            assert line.startswith("stopped:") and f"got ['{name}'], which would compute" in line
        assert lines[2:6] == [
            "LlamaForCausalLM [[0, 0, 1, 1]] None",
            "GptOssForCausalLM [[0, 0, 1, 1]] vllm",
            "LlamaForCausalLM None None",
            "GptOssForCausalLM None vllm",
        ]
