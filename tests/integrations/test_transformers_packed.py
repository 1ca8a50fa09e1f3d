"""Packed sequences and sliding windows without masks; transformers' continuous batching."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, masking_utils

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.convert import convert
from gqa_kernels.integrations.transformers import (
    asym_gqa,
    attention_call,
    continuous_batching,
    packed,
    register,
)
from gqa_kernels.integrations.transformers.masks import Pattern, SequenceMask, read, sequence_mask
from gqa_kernels.integrations.transformers.packed import batched_attention, packed_attention
from gqa_kernels.integrations.transformers.versions import installed
from tests.integrations.releases import needs_batching
from tests.tiny_models import batch, expanded, split, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
LENGTHS = (7, 1, 12)
OFFSETS = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BY_POSITIONS = {"position_ids": POSITIONS}
BY_OFFSETS = {  # as DataCollatorWithFlattening gives them
    "position_ids": POSITIONS, "cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS,
    "max_length_q": 12, "max_length_k": 12,
}  # fmt: skip
GIVEN = pytest.mark.parametrize("given", [BY_POSITIONS, BY_OFFSETS], ids=["positions", "offsets"])


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture
def no_square(monkeypatch):
    """Nothing may make the mask of a square of tokens."""

    def made(**call):
        mask = stock(**call)
        assert mask is None or mask.shape[2] == 1
        return mask

    stock = masking_utils.sdpa_mask
    monkeypatch.setattr(masking_utils, "sdpa_mask", made)


def row():
    """The sequences in one row, and each alone."""
    rows = [batch([n], "left", seed=n)["input_ids"] for n in LENGTHS]
    return torch.cat(rows, 1), rows


@GIVEN
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_logits(family, given, no_square):
    """Windows shorter than the sequences, softcap, sinks."""
    model = split(tiny(family, **({"sliding_window": 4} if family == "mistral" else {})), 4)
    ids, rows = row()
    with torch.no_grad():
        ours = model(ids, use_cache=False, **given).logits
        theirs = torch.cat([model(one, use_cache=False).logits for one in rows], 1)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@GIVEN
def test_gradients(given, no_square):
    """Of a step over packed sequences, against each alone, through expanded K and V on SDPA."""
    model = split(tiny("mistral", sliding_window=4), 4)
    ids, rows = row()
    grads = []
    for one, calls in ((model, [(ids, given)]), (expanded(model), [(r, {}) for r in rows])):
        one.train()
        total = sum(
            one(x, use_cache=False, **options).logits.square().sum() for x, options in calls
        )
        total.backward()
        grads.append(one.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-2)  # gradients up to about 400


def test_rows_that_are_packed():
    """Position ids cut each row of a batch at places of its own."""
    model = split(tiny(), 4)
    ids = batch([10, 10], "left")["input_ids"]
    positions = torch.stack([torch.arange(10), torch.arange(10) % 4])
    with torch.no_grad():
        ours = model(ids, position_ids=positions, use_cache=False).logits
        theirs = [model(ids[:1], use_cache=False).logits]
        parts = [model(part, use_cache=False).logits for part in ids[1:].split(4, 1)]
    torch.testing.assert_close(ours, torch.cat([*theirs, torch.cat(parts, 1)]), **CLOSE)


@pytest.mark.parametrize(
    "positions",
    [range(8), [5, 6, 7, 8, 9, 10, 11, 12], [0, 1, 2, 3, 8, 9, 10, 11], [1, 1, 1, 0, 1, 2, 3, 4]],
    ids=["one", "later", "jump", "padding"],
)
def test_positions_of_one_sequence(positions):
    """GPT-OSS tells attention the positions alone."""
    module = split(tiny("gpt_oss"), 4).model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, 8, 16) for heads in (6, 4, 4))
    options = {"position_ids": torch.tensor([list(positions)])}
    assert packed_attention(module, q, k, v, None, "auto", **options) is None


def test_positions_of_a_model_in_another_thread(monkeypatch):
    """It may come in between at any point, here where the first thread's are remembered."""
    known = packed._LastPositions()
    other = torch.tensor([[0, 1, 0, 1, 2]])
    expected = known.offsets(other, 5)

    def interrupted(positions):
        if positions is not other:
            assert torch.equal(known.offsets(other, 5), expected)
        return weakref.ref(positions)

    monkeypatch.setattr(packed, "weakref", SimpleNamespace(ref=interrupted))
    assert known.offsets(POSITIONS, sum(LENGTHS)).tolist() == OFFSETS.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_dropout_takes_a_mask(family):
    """The kernels of packed sequences have none; the mask keeps the sequences apart."""
    model = split(tiny(family, attention_dropout=0.5), 4).train()
    ids, _ = row()
    change = ids.clone()
    change[:, :8] = 5
    found = []
    for one in (ids, change):
        torch.manual_seed(0)
        found.append(model(one, use_cache=False, **BY_POSITIONS).logits[:, 8:])
    torch.testing.assert_close(*found, **CLOSE)


def test_offsets_and_an_additive_mask():
    module = split(tiny(), num_kv_heads=4).model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 16) for heads in (6, 4, 4))
    mask = torch.randn(1, 1, sum(LENGTHS), sum(LENGTHS))
    call = attention_call(module, q, k, v, mask, cu_seq_lens_q=OFFSETS)
    assert packed_attention(module, q, k, v, mask, "auto", cu_seq_lens_q=OFFSETS) is None
    parts, begin = [], 0
    for n in LENGTHS:
        rows = slice(begin, begin + n)
        part = attention_call(module, *(x[:, :, rows] for x in (q, k, v)), None)
        part.update(attn_mask=mask[..., rows, rows], causal=True)
        parts.append(asym_gqa_attention(**part))
        begin += n
    torch.testing.assert_close(asym_gqa_attention(**call), torch.cat(parts, 1))


def test_offsets_of_a_bidirectional_layer():
    module = split(tiny(), num_kv_heads=4).model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 16) for heads in (6, 4, 4))
    options = {"cu_seq_lens_q": OFFSETS, "is_causal": False}
    ours = packed_attention(module, q, k, v, None, "auto", **options)
    masked = attention_call(module, q, k, v, None, **options)
    torch.testing.assert_close(ours, asym_gqa_attention(**masked), **CLOSE)
    assert not masked["causal"]


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that an op gives."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("given", ["positions", "window"])
def test_memory(given):
    """No op gives as much as a boolean mask of S² has, forward and backward."""
    tokens = 2048
    model = split(tiny("mistral", sliding_window=16 if given == "window" else None), 4).train()
    ids = torch.randint(3, 64, (1, tokens))
    options = {"position_ids": torch.arange(tokens)[None] % 256} if given == "positions" else {}
    with Largest() as largest:
        model(ids, use_cache=False, **options).logits.sum().backward()
    assert largest.nbytes < tokens**2 / 2


class TestMask:
    CAUSAL = staticmethod(masking_utils.causal_mask_function)
    WINDOW = staticmethod(masking_utils.sliding_window_causal_mask_function(3))

    @staticmethod
    def call(function, tokens=8, **options):
        """A call as transformers 5 makes it, with what transformers 4 has in place of q_length."""
        return {
            "batch_size": 2, "q_length": tokens, "kv_length": tokens, "q_offset": 0,
            **({"cache_position": torch.arange(tokens)} if installed() < (5, 0) else {}),
            "kv_offset": 0, "mask_function": function, "local_size": None,
            "allow_is_causal_skip": False, "device": "cpu", **options,
        }  # fmt: skip

    @staticmethod
    def packed(function):
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 0]])
        """As models put it together, in whichever way the installed release does."""
        sequences = masking_utils.find_packed_sequence_indices(positions)
        if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
            function = masking_utils.remap_positions_for_packed_sequence(function, positions)
        inside = masking_utils.packed_sequence_mask_function(sequences)
        return masking_utils.and_masks(function, inside)

    @pytest.mark.parametrize("window", [None, 3])
    def test_what_it_says_is_what_the_function_shows(self, window):
        mask = sequence_mask(**self.call(self.packed(self.WINDOW if window else self.CAUSAL)))
        assert (mask.window, mask.offsets.tolist(), mask.longest) == (window, [0, 3, 8, 15, 16], 7)
        token = torch.arange(16)
        sequence = torch.bucketize(token, mask.offsets[1:-1].long(), right=True)
        visible = (sequence[:, None] == sequence) & (token <= token[:, None])
        visible &= token > token[:, None] - (window or 16)
        rows = torch.stack([visible[:8, :8], visible[8:, 8:]])[:, None]
        assert torch.equal(mask.dense, rows)

    def test_a_window(self):
        mask = sequence_mask(**self.call(self.WINDOW))
        assert (mask.window, mask.offsets) == (3, None)
        assert torch.equal(mask.dense[0, 0].sum(1), torch.tensor([1, 2, 3, 3, 3, 3, 3, 3]))

    def test_attention_takes_its_window(self):
        """Also from a layer that does not name one, in a module that is not causal by itself."""
        module = split(tiny(), num_kv_heads=4).model.layers[0].self_attn
        module.is_causal = False
        q, k, v = (torch.zeros(1, heads, 5, 16) for heads in (6, 4, 4))
        call = attention_call(module, q, k, v, SequenceMask(3, None, 5, lambda: None))
        assert (call["causal"], call["window"], call["attn_mask"]) == (True, (2, None), None)

    def test_rows_that_are_one_sequence_each(self):
        positions = torch.arange(8).expand(2, -1)
        function = masking_utils.packed_sequence_mask_function(torch.zeros_like(positions))
        mask = sequence_mask(**self.call(masking_utils.and_masks(self.CAUSAL, function)))
        assert (mask.window, mask.offsets) == (None, None)
        assert torch.equal(mask.dense[0, 0], torch.ones(8, 8, dtype=torch.bool).tril())

    def test_whatever_looks_into_it_gets_the_mask(self):
        mask = sequence_mask(**self.call(self.WINDOW))
        assert mask.shape == (2, 1, 8, 8)
        for ours, theirs in (
            (mask[..., :4], mask.dense[..., :4]),
            (torch.cat([mask, mask], -1), torch.cat([mask.dense] * 2, -1)),
            (torch.ones(8, 8) * mask, torch.ones(8, 8) * mask.dense),
            (~mask, ~mask.dense),
            (mask == 0, mask.dense == 0),
        ):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        "options",
        [
            {"attention_mask": torch.arange(8)[None].expand(2, -1) > 2},
            {"kv_length": 9},
            {"q_offset": torch.tensor(0)},
            {"kv_offset": 1},
        ],
        ids=["padding", "longer", "offset-on-device", "behind"],
    )
    def test_other_calls_are_masked(self, options):
        assert isinstance(sequence_mask(**self.call(self.WINDOW, **options)), torch.Tensor)

    def test_functions_that_are_not_known(self):
        def mine(batch, head, q, kv):
            return kv <= q

        mine.__module__, mine.__qualname__ = self.CAUSAL.__module__, self.CAUSAL.__qualname__
        both = masking_utils.and_masks(self.CAUSAL, mine)
        either = masking_utils.or_masks(self.WINDOW, self.CAUSAL)
        blocks = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
        twice = masking_utils.and_masks(self.WINDOW, self.WINDOW)
        bidirectional = masking_utils.sliding_window_overlay(3)
        for function in (mine, both, either, blocks, twice, bidirectional, max):
            assert read(function) is None
        assert read(self.WINDOW) == Pattern(3)
        assert sequence_mask(**self.call(self.CAUSAL, allow_is_causal_skip=True)) is None

    def test_a_mask_that_is_given_again(self):
        """By a model to a model within it."""
        mask = sequence_mask(**self.call(self.WINDOW))
        assert sequence_mask(**self.call(self.CAUSAL, attention_mask=mask)) is mask

    def test_a_window_longer_than_the_row_is_none(self):
        options = {"local_size": 9, "allow_is_causal_skip": True}
        function = masking_utils.sliding_window_causal_mask_function(9)
        assert sequence_mask(**self.call(function, **options)) is None

    def test_of_no_layer(self):
        """Dense, where attention can't do without."""
        mask = SequenceMask(2, None, 3, lambda: torch.ones(3, 3, dtype=torch.bool).tril())
        with pytest.raises(AttributeError, match="__array_interface__"):
            mask.__array_interface__  # noqa: B018
        assert mask.sum() == 6


@needs_batching
class TestContinuousBatching:
    PROMPTS = ([5, 9, 3, 22], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19])

    @staticmethod
    def generated(model, prompts, **options):
        from transformers import ContinuousBatchingConfig  # not in transformers 4

        config = ContinuousBatchingConfig(
            page_size=4, num_blocks=32, max_batch_tokens=16, **options
        )
        found = model.generate_batch(
            list(prompts), continuous_batching_config=config, warmup=False,
            generation_config=GenerationConfig(
                max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
        )  # fmt: skip
        assert all(one.error is None for one in found.values())
        return [found[name].generated_tokens for name in sorted(found, key=_number)]

    @pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
    def test_tokens(self, family):
        """Of uneven maps, as generate() gives them one by one."""
        model = split(tiny(family, **({"sliding_window": 6} if family == "mistral" else {})), 4)
        model.generation_config.eos_token_id = None
        alone = [
            model.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False)[0, len(p) :]
            for p in self.PROMPTS
        ]
        with continuous_batching(model):
            together = self.generated(model, self.PROMPTS)
        assert together == [one.tolist() for one in alone]
        assert model.config._attn_implementation == "asym_gqa"

    def test_without_it_transformers_says_no(self):
        with pytest.raises(ValueError, match="asym_gqa is not supported for continuous batching"):
            self.generated(split(tiny(), 4), self.PROMPTS)

    def test_another_cache(self):
        module = tiny().model.layers[0].self_attn
        q = torch.zeros(1, 6, 3, 16)
        with pytest.raises(NotImplementedError, match=r"must use the cache .* got a Tensor left"):
            batched_attention(module, q, q, q, "auto", cache=q)

    def test_a_cache_that_the_module_did_not_use(self):
        """Other caches have an update too, since transformers 5.24 with the same arguments."""
        module = tiny().model.layers[0].self_attn
        q = torch.zeros(1, 6, 3, 16)
        with pytest.raises(NotImplementedError, match=r"LlamaAttention\.forward must use the"):
            asym_gqa(module, q, q, q, None, cache=DynamicCache())

    def test_a_block_table(self):
        """With one the keys of earlier steps are not among those that attention is passed."""
        module = tiny().model.layers[0].self_attn
        q = torch.zeros(1, 6, 3, 16)
        with pytest.raises(NotImplementedError, match="max_blocks_per_request=0"):
            asym_gqa(module, q, q, q, None, block_table=torch.zeros(1, 1))

    @pytest.mark.parametrize(
        "maps",
        [
            [HeadMap([0, 0, 1, 1, 1, 1]), HeadMap([0, 1, 2, 2, 2, 2])],
            [
                (HeadMap([0, 0, 1, 1, 1, 1]), HeadMap([0, 1, 2, 3, 3, 3])),
                (HeadMap([0, 1, 2, 2, 2, 2]), HeadMap([0] * 6)),
            ],
        ],
        ids=["layers", "layers, K and V"],
    )
    def test_other_numbers_of_heads_in_each_layer(self, maps):
        model = convert(tiny(), maps)
        model.set_attn_implementation(register())
        model.generation_config.eos_token_id = None
        heads = model.config.num_key_value_heads
        alone = [
            model.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False)[0, len(p) :]
            for p in self.PROMPTS
        ]
        with continuous_batching(model):
            together = self.generated(model, self.PROMPTS)
            again = self.generated(tiny(), self.PROMPTS[:1])  # another model, meanwhile
        assert together == [one.tolist() for one in alone]
        assert len(again[0]) == 10
        assert model.config.num_key_value_heads == heads

    def test_transformers_too_old(self, monkeypatch):
        name = "gqa_kernels.integrations.transformers.versions.version"
        monkeypatch.setattr(name, lambda _: "5.16.0")
        with (
            pytest.raises(ImportError, match=r"needs transformers >= 5\.23 .*: found 5\.16"),
            continuous_batching(tiny()),
        ):
            pass


def _number(request: str) -> int:
    return int(request.rsplit("_", 1)[1])
