"""SGLang's batches over its token pool; and its classes, where SGLang can be imported."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.integrations import sglang as integration
from gqa_kernels.integrations.engine_layer import Layer
from gqa_kernels.integrations.sglang.attention import Step, page_tables, pooled_attention
from gqa_kernels.models.maps import guarded_architecture
from tests.integrations.stand_ins import stand_in

HEAD_MAP = HeadMap([0, 2, 0, 1, 0])  # 5 query heads over 3 KV heads
VALUE_MAP = HeadMap([2, 0, 1, 1, 2])
DIM, VALUE_DIM = 16, 8
CONTEXT = 32

needs_sglang = pytest.mark.skipif(find_spec("sglang") is None, reason="sglang is not installed")


class Engine:
    """Requests of growing length in a token pool: what a model runner keeps.

    Rows of ``req_to_token`` begin at 1; a request takes whole pages, in any order.
    """

    def __init__(self, num_requests: int, page_size: int, value_dim: int = VALUE_DIM):
        torch.manual_seed(0)
        self.page_size, self.value_dim = page_size, value_dim
        pages = CONTEXT // page_size
        # A slot is left over, as where the pool's size is no multiple of the page size.
        slots = (num_requests * pages + 1) * page_size + (page_size > 1)
        heads = HEAD_MAP.num_kv_heads
        self.k_pool = torch.full((slots, heads, DIM), torch.nan)
        self.v_pool = torch.full((slots, heads, value_dim), torch.nan)
        order = 1 + torch.randperm(num_requests * pages).view(num_requests, pages)
        tokens = (order[..., None] * page_size + torch.arange(page_size)).flatten(1)
        self.req_to_token = torch.zeros(num_requests + 1, CONTEXT, dtype=torch.int32)
        self.req_to_token[1:] = tokens
        self.keys = [torch.zeros(0, heads, DIM) for _ in range(num_requests)]
        self.values = [torch.zeros(0, heads, value_dim) for _ in range(num_requests)]

    def new(self, new_tokens: list[int]) -> tuple[torch.Tensor, ...]:
        """Query, key and value of new tokens, and the slots they go to."""
        total = sum(new_tokens)
        query = torch.randn(total, HEAD_MAP.num_heads, DIM)
        key = torch.randn(total, *self.keys[0].shape[1:])
        value = torch.randn(total, *self.values[0].shape[1:])
        slots, begin = [], 0
        for r, n in enumerate(new_tokens):
            old = len(self.keys[r])
            slots.append(self.req_to_token[r + 1, old : old + n])
            self.keys[r] = torch.cat([self.keys[r], key[begin : begin + n]])
            self.values[r] = torch.cat([self.values[r], value[begin : begin + n]])
            begin += n
        return query, key, value, torch.cat(slots).long()

    @property
    def lens(self) -> torch.Tensor:
        return torch.tensor([len(k) for k in self.keys])

    def step(self, new_tokens: list[int]) -> Step:
        requests = torch.arange(1, len(self.keys) + 1)
        longest = int(self.lens.max())
        table = page_tables(self.req_to_token, requests, longest, self.page_size)
        decode = set(new_tokens) == {1}
        offsets = torch.tensor([0, *accumulate(new_tokens)], dtype=torch.int32)
        return Step(
            table, self.lens.int(), None if decode else offsets, max(new_tokens), self.page_size
        )

    def expected(self, query: torch.Tensor, new_tokens: list[int], **options) -> torch.Tensor:
        """Each request by itself, over its keys so far."""
        outs, begin = [], 0
        options = {"causal": True, **options}
        for n, k, v in zip(new_tokens, self.keys, self.values, strict=True):
            out = asym_gqa_attention(
                query[None, begin : begin + n], k[None], v[None], HEAD_MAP, layout="bshd",
                backend="reference", **options,
            )  # fmt: skip
            outs.append(out[0])
            begin += n
        return torch.cat(outs)


def layer(**options) -> Layer:
    return Layer(HEAD_MAP, DIM**-0.5, **options)


@pytest.mark.parametrize("page_size", [1, 4])
def test_extend_then_extend_with_prefix_then_decode(page_size):
    engine = Engine(3, page_size)
    for new_tokens in ([9, 1, 5], [1, 7, 3], [1, 1, 1]):
        query, key, value, slots = engine.new(new_tokens)
        engine.k_pool[slots], engine.v_pool[slots] = key, value
        before = engine.k_pool.data_ptr(), engine.k_pool.clone()
        out = pooled_attention(
            layer(), engine.step(new_tokens), query, engine.k_pool, engine.v_pool
        )
        torch.testing.assert_close(out, engine.expected(query, new_tokens))
        torch.testing.assert_close(engine.k_pool, before[1], equal_nan=True)


def test_options():
    engine = Engine(2, 2)
    options = {"value_head_map": VALUE_MAP, "softcap": 2.0, "sinks": torch.randn(5)}
    for new_tokens in ([9, 4], [1, 1]):
        query, key, value, slots = engine.new(new_tokens)
        engine.k_pool[slots], engine.v_pool[slots] = key, value
        out = pooled_attention(
            layer(window=3, **options), engine.step(new_tokens), query, engine.k_pool,
            engine.v_pool,
        )  # fmt: skip
        torch.testing.assert_close(
            out, engine.expected(query, new_tokens, window=(3, None), **options)
        )


def test_sglang_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match=r"needs sglang >= 0\.5\.23"):
        integration.register()


class TestRegistered:
    """With stand-ins for the parts of SGLang that registration touches."""

    @pytest.fixture(autouse=True)
    def sglang(self, monkeypatch):
        self.backends, self.choices = {}, []
        attention = "sglang.srt.layers.attention"
        stand_in(
            monkeypatch, f"{attention}.attention_registry", ATTENTION_BACKENDS=self.backends,
            register_attention_backend=lambda name: lambda make: self.backends.update({name: make}),
        )  # fmt: skip
        backend = type("AttentionBackend", (), {"init_forward_metadata_out_graph": None})
        stand_in(monkeypatch, f"{attention}.base_attn_backend", AttentionBackend=backend)
        stand_in(
            monkeypatch, "sglang.srt.server_args", ATTENTION_BACKEND_CHOICES=self.choices,
            add_attention_backend_choices=self.choices.extend,
        )  # fmt: skip
        monkeypatch.setenv(integration.MODELS_VARIABLE, "")
        monkeypatch.delenv(integration.MODELS_VARIABLE)

    def test_backend_and_models(self):
        integration.register()
        integration.plugin()
        assert list(self.backends) == self.choices == ["asym_gqa"]
        assert os.environ[integration.MODELS_VARIABLE] == integration.MODELS
        assert find_spec(f"{integration.MODELS}.uneven")

    def test_a_model_package_of_the_user_stays(self, monkeypatch):
        monkeypatch.setenv(integration.MODELS_VARIABLE, "mine")
        with pytest.warns(UserWarning, match="is 'mine', so SGLang can't load models with uneven"):
            integration.register()
        assert os.environ[integration.MODELS_VARIABLE] == "mine"


class TestModels:
    """Model classes for uneven checkpoints, over classes that stand in for SGLang's."""

    @pytest.fixture
    def uneven(self, monkeypatch):
        class Stock:
            def __init__(self, config, prefix=""):
                self.given = config, prefix

        models = "gqa_kernels.integrations.sglang.models.uneven"
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
            name = f"{family}ForCausalLM"
            stock = type(name, (Stock,), {})
            stand_in(monkeypatch, f"sglang.srt.models.{family.lower()}", **{name: stock})
        self.arguments = SimpleNamespace(attention_backend="asym_gqa")
        stand_in(
            monkeypatch, "sglang.srt.server_args", get_global_server_args=lambda: self.arguments
        )
        monkeypatch.delitem(sys.modules, models, raising=False)
        yield import_module(models)
        sys.modules.pop(models, None)

    def test_names_are_those_that_save_writes(self, uneven):
        names = [c.__name__ for c in uneven.EntryClass]
        assert names[0] == guarded_architecture("LlamaForCausalLM") and len(names) == 4
        assert uneven.EntryClass[0]("config", prefix="model").given == ("config", "model")

    @pytest.mark.parametrize(
        "options",
        [
            {"attention_backend": "flashinfer"},
            {"attention_backend": None},
            {"attention_backend": "asym_gqa", "decode_attention_backend": "triton"},
        ],
    )
    def test_other_backends_are_refused(self, uneven, options):
        self.arguments = SimpleNamespace(**options)
        for model_class in uneven.EntryClass:
            with pytest.raises(NotImplementedError, match="would compute equal groups"):
                model_class("config")


def test_sglang_too_old(monkeypatch):
    """Its backends have another contract."""
    attention = "sglang.srt.layers.attention"
    stand_in(
        monkeypatch, f"{attention}.attention_registry",
        ATTENTION_BACKENDS={}, register_attention_backend=object,
    )  # fmt: skip
    stand_in(monkeypatch, f"{attention}.base_attn_backend", AttentionBackend=object)
    stand_in(
        monkeypatch, "sglang.srt.server_args",
        ATTENTION_BACKEND_CHOICES=[], add_attention_backend_choices=object,
    )  # fmt: skip
    with pytest.raises(ImportError, match=r"needs sglang >= 0\.5\.23: this one has another"):
        integration.register()
    with pytest.warns(UserWarning, match=r"not registered with SGLang: .* another contract"):
        integration.plugin()  # which must not stop SGLang


@needs_sglang
class TestWithSGLang:
    @pytest.fixture(autouse=True)
    def one_rank(self, monkeypatch):
        from gqa_kernels.integrations.sglang import backend

        monkeypatch.setattr(backend, "get_parallel", lambda: SimpleNamespace(tp_size=1))

    def runner(self, engine, dtype=torch.float32, **config):
        """A model runner as far as the backend looks at it, with SGLang's own pool."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        pool = MHATokenToKVPool(
            size=engine.k_pool.shape[0] // engine.page_size * engine.page_size - engine.page_size,
            page_size=engine.page_size, dtype=dtype, head_num=3, head_dim=DIM,
            v_head_dim=engine.value_dim, layer_num=2, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        maps = [list(HEAD_MAP)] * 2
        config = {"num_key_value_heads": 3, "kv_head_map": maps, "value_head_map": None, **config}
        return SimpleNamespace(
            token_to_kv_pool=pool,
            req_to_token_pool=SimpleNamespace(req_to_token=engine.req_to_token),
            page_size=engine.page_size,
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**config)),
        )

    def batch(self, engine, new_tokens, slots, decode):
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(new_tokens),
            input_ids=torch.zeros(sum(new_tokens), dtype=torch.int64),
            req_pool_indices=torch.arange(1, len(new_tokens) + 1),
            seq_lens=engine.lens,
            out_cache_loc=slots,
            seq_lens_sum=int(engine.lens.sum()),
        )
        batch.seq_lens_cpu = engine.lens
        if not decode:
            batch.extend_seq_lens = torch.tensor(new_tokens, dtype=torch.int32)
            batch.extend_seq_lens_cpu = new_tokens
        return batch

    def attention(self, **options):
        from sglang.srt.layers.radix_attention import RadixAttention

        return RadixAttention(
            5, DIM, DIM**-0.5, num_kv_heads=3, layer_id=1, v_head_dim=VALUE_DIM, **options
        )

    def test_registered(self):
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
        from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

        integration.register()
        integration.register()
        from gqa_kernels.integrations.sglang.backend import AsymGQABackend

        assert ATTENTION_BACKEND_CHOICES.count(integration.BACKEND) == 1
        created = ATTENTION_BACKENDS[integration.BACKEND](self.runner(Engine(1, 1)))
        assert type(created) is AsymGQABackend

    @pytest.mark.parametrize("page_size", [1, 4])
    def test_steps(self, page_size):
        from gqa_kernels.integrations.sglang.backend import AsymGQABackend

        engine = Engine(3, page_size)
        backend = AsymGQABackend(self.runner(engine))
        this = self.attention(logit_cap=2.0, sliding_window_size=6)
        options = {"softcap": 2.0, "window": (6, None)}
        for new_tokens in ([9, 1, 5], [1, 7, 3], [1, 1, 1]):
            query, key, value, slots = engine.new(new_tokens)
            batch = self.batch(engine, new_tokens, slots, decode=new_tokens == [1, 1, 1])
            backend.init_forward_metadata(batch)
            out = backend.forward(query.flatten(1), key, value, this, batch)
            expected = engine.expected(query, new_tokens, **options).flatten(1)
            torch.testing.assert_close(out, expected)

    def test_decode_as_captured_and_replayed(self):
        """Each replay reads the same memory, refreshed; padding rows do no harm."""
        from gqa_kernels.integrations.sglang.backend import AsymGQABackend

        engine = Engine(2, 4)
        backend = AsymGQABackend(self.runner(engine))
        this = self.attention()
        query, key, value, slots = engine.new([6, 3])
        batch = self.batch(engine, [6, 3], slots, decode=False)
        backend.init_forward_metadata(batch)
        backend.forward(query.flatten(1), key, value, this, batch)
        backend.init_cuda_graph_state(max_bs=4, max_num_tokens=4)
        addresses = set()
        for capture in (True, False, False):
            query, key, value, slots = engine.new([1, 1])
            batch = self.batch(engine, [1, 1], slots, decode=True)
            batch.batch_size = 3
            fill = backend.get_cuda_graph_seq_len_fill_value()
            batch.seq_lens = torch.cat([batch.seq_lens, torch.tensor([fill])])
            batch.req_pool_indices = torch.tensor([1, 2, 0])
            batch.out_cache_loc = torch.cat([slots, torch.tensor([0])])
            padded = [torch.cat([x, torch.zeros_like(x[:1])]) for x in (query, key, value)]
            backend.init_forward_metadata_out_graph(batch, in_capture=capture)
            step = backend.forward_metadata
            addresses.add((step.page_table.data_ptr(), step.seq_lens.data_ptr()))
            out = backend.forward(padded[0].flatten(1), *padded[1:], this, batch)
            torch.testing.assert_close(out[:2], engine.expected(query, [1, 1]).flatten(1))
        assert len(addresses) == 1

    def test_fp8_pool(self):
        from gqa_kernels.integrations.sglang.backend import AsymGQABackend

        engine = Engine(2, 1)
        backend = AsymGQABackend(self.runner(engine, dtype=torch.float8_e4m3fn))
        this = self.attention()
        query, key, value, slots = engine.new([5, 8])
        batch = self.batch(engine, [5, 8], slots, decode=False)
        backend.init_forward_metadata(batch)
        out = backend.forward(query.flatten(1), key.clone(), value.clone(), this, batch)
        engine.keys, engine.values = (
            [x.to(torch.float8_e4m3fn).float() for x in xs] for xs in (engine.keys, engine.values)
        )
        torch.testing.assert_close(out, engine.expected(query, [5, 8]).flatten(1))

    def test_errors(self, monkeypatch):
        from gqa_kernels.integrations.sglang import backend

        engine = Engine(1, 1)
        fewer = [list(HEAD_MAP), [0, 1, 0, 1, 0]]
        with pytest.raises(NotImplementedError, match=r"have one count, got \[2, 3\]"):
            backend.AsymGQABackend(self.runner(engine, kv_head_map=fewer))
        with pytest.raises(NotImplementedError, match="needs SGLang's MHATokenToKVPool, got int"):
            runner = self.runner(engine)
            runner.token_to_kv_pool = 1
            backend.AsymGQABackend(runner)
        ours = backend.AsymGQABackend(self.runner(engine))
        query, key, value, slots = engine.new([2])
        batch = self.batch(engine, [2], slots, decode=False)
        with pytest.raises(NotImplementedError, match=r"captures decode steps .* got EXTEND"):
            ours.init_forward_metadata_out_graph(batch)
        with pytest.raises(NotImplementedError, match="does not take k_rope"):
            ours.forward(query, key, value, self.attention(), batch, k_rope=key)
        batch.spec_info = object()
        with pytest.raises(NotImplementedError, match="got EXTEND with speculation"):
            ours.init_forward_metadata(batch)
        monkeypatch.setattr(backend, "get_parallel", lambda: SimpleNamespace(tp_size=2))
        with pytest.raises(NotImplementedError, match=r"tp_size must be 1 .* got 2"):
            backend.AsymGQABackend(self.runner(engine))
