"""PagedCache: generate() and forced tokens as with transformers' own caches; memory; errors."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from gqa_kernels import OutOfPages
from gqa_kernels.cache.formats import STORED_AS, dequantize, quantize, row_scales
from gqa_kernels.convert import convert
from gqa_kernels.integrations.transformers import PagedCache, register
from gqa_kernels.integrations.transformers.sequences import SequenceTable
from gqa_kernels.integrations.transformers.versions import installed
from tests.integrations.releases import CACHE
from tests.tiny_families import maps_for
from tests.tiny_families import tiny as tiny_of_family
from tests.tiny_models import batch, split, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits of two fp32 summation orders, values up to about 5
PAGE = 4


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


@pytest.fixture(scope="module")
def llama():
    return split(tiny(), num_kv_heads=4)


def generated(model, inputs, cache=None, **options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(**inputs, **{CACHE: cache}, **options).tolist()


@torch.no_grad()
def forced(model, inputs, cache, chunks, seen=0):
    """Logits of tokens given in chunks after those seen, but for the padding's."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for size in chunks:
        now = slice(seen, seen + size)
        seen += size
        out = model(
            ids[:, now], attention_mask=mask[:, :seen], position_ids=positions[:, now],
            **{CACHE: cache}, use_cache=True,
        ).logits  # fmt: skip
        logits += [(mask[:, now].bool(), out)]
    real, logits = (torch.cat(x, 1) for x in zip(*logits, strict=True))
    return logits[real]


def last(inputs, tokens):
    """Which of the real tokens of a batch are among the last positions."""
    late = inputs["attention_mask"].clone()
    late[:, :-tokens] = 0
    return late.bool()[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("lengths", [[13], [13, 4, 1]], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_generated_tokens(family, lengths, options):
    window = {"sliding_window": 8} if family == "mistral" else {}
    model = split(tiny(family, **window), num_kv_heads=4)
    inputs = batch(lengths, "left")
    paged = PagedCache(model.config, page_size=PAGE)
    assert generated(model, inputs, paged, **options) == generated(model, inputs, **options)


def test_sampled_tokens(llama):
    inputs = batch([13, 4], "left")
    found = []
    for cache in (PagedCache(llama.config), None):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 2}
        found.append(generated(llama, inputs, cache, **options))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_other_families_with_other_counts_for_values(family):
    parent = tiny_of_family(family)
    model = convert(parent, maps_for(parent))
    model.set_attn_implementation("asym_gqa")
    inputs = batch([9, 5], "left")
    paged = PagedCache(model.config, page_size=PAGE)
    assert generated(model, inputs, paged) == generated(model, inputs)


def test_self_attention_of_an_encoder_decoder():
    """T5: a position bias over the pages."""
    parent = tiny_of_family("t5")
    model = convert(parent, maps_for(parent))
    model.set_attn_implementation("asym_gqa")
    inputs = batch([9, 5], "right")
    paged = EncoderDecoderCache(PagedCache(model.config, page_size=PAGE), DynamicCache())
    assert generated(model, inputs, paged) == generated(model, inputs)


@pytest.mark.parametrize(
    ("lengths", "side"),
    [([20, 13, 3], "left"), ([20, 13, 3], "right"), ([20, 18], "left")],
    ids=["left", "right", "first-chunk"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_logits_of_chunks(family, lengths, side):
    """Masks that say what lengths do, and more: padding in a later chunk, or behind tokens."""
    model = split(tiny(family), num_kv_heads=4)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # the masks say all
    inputs = batch(lengths, side)
    paged = PagedCache(model.config, page_size=PAGE)
    ours = forced(model, inputs, paged, [5, 9, 1, 1, 3, 1])
    theirs = forced(model, inputs, DynamicCache(config=model.config), [20])
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("window", [None, 4])
def test_left_padding_needs_no_mask_in_decode(window):
    """Lengths and the window say what transformers' mask says, which is dropped."""
    padding = torch.tensor([0, 3])

    def mask(rows):  # of queries at the last positions, as transformers makes it
        row, column = rows[:, None], torch.arange(int(rows[-1]) + 1)
        seen = (column <= row) & (column > row - (window or 100))
        return (seen & (column >= padding[:, None, None]))[:, None]

    table = SequenceTable(PAGE, None, window)
    device = torch.device("cpu")
    table.step(0, 2, 9, mask(torch.arange(9)), device)
    for seen, new in ((9, 1), (10, 5)):
        given = mask(torch.arange(seen, seen + new))
        step = table.step(seen, 2, new, given, device)
        capacity = PAGE * step.page_table.shape[1]
        assert step.mask(given, capacity, new) is None
        other = given.clone()
        other[0, 0, 0, -2] ^= True
        assert step.mask(other, capacity, new).shape == (2, 1, new, capacity)


def test_a_mask_of_ones_own(llama):
    """A 4D mask of a draft tree: two tokens that don't see each other."""
    ids = batch([9], "left")["input_ids"]
    mask = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    mask[0, 0, :, 7:] = torch.eye(2, dtype=torch.bool)
    positions = torch.tensor([[7, 7]])
    results = []
    for additive in (False, True):
        given = mask
        if additive:
            given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        for cache in (PagedCache(llama.config, page_size=PAGE), DynamicCache(config=llama.config)):
            with torch.no_grad():
                llama(ids[:, :7], **{CACHE: cache}, use_cache=True)
                options = {"attention_mask": given, "position_ids": positions}
                results.append(llama(ids[:, 7:], **{CACHE: cache}, **options).logits)
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], **CLOSE)


class Rounded(DynamicLayer):
    """transformers' layer holding what a format stores; a prompt is seen unrounded, as ours is."""

    def __init__(self, format, zeros):
        super().__init__()
        self.formats, self.zeros = STORED_AS[format], zeros

    def update(self, keys, values, *_, **__):
        first = self.get_seq_length() == 0
        stored = super().update(*map(self._rounded, (keys, values), self.formats))
        return (keys, values) if first else stored

    def _rounded(self, x, format):
        scale, zero = row_scales(x, format, self.zeros)
        return dequantize(quantize(x, format, scale, zero), scale, zero)


@pytest.mark.parametrize(
    ("format", "zeros"),
    [("int8", False), ("int4", True), ("fp8_e4m3", False), ("k8v4", False)],
    ids=["int8", "int4-zeros", "fp8", "k8v4"],
)
def test_quantised(llama, format, zeros):
    inputs = batch([16, 7], "left")
    chunks = [9, 3, 1, 1, 1, 1]
    paged = PagedCache(llama.config, page_size=PAGE, format=format, zeros=zeros)
    rounded = DynamicCache(config=llama.config)
    rounded.layers = [Rounded(format, zeros) for _ in rounded.layers]
    ours, theirs = (forced(llama, inputs, cache, chunks) for cache in (paged, rounded))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    exact = forced(llama, inputs, DynamicCache(config=llama.config), chunks)
    assert not torch.allclose(ours, exact, **CLOSE)


@pytest.mark.parametrize("budgets", [False, True], ids=["plain", "budgets"])
def test_rotated_keys(llama, budgets):
    """The scores are the same; dense copies of the keys, too."""
    inputs = batch([16], "left")
    chunks = [9, 3, 1, 1, 1, 1]
    layers = [[(2, 8), None, None, (4, 4)]] * llama.config.num_hidden_layers
    options = {"page_size": PAGE, "budgets": layers if budgets else None}
    plain, rotated = (
        PagedCache(llama.config, hadamard=hadamard, **options) for hadamard in (False, True)
    )
    expected, found = (forced(llama, inputs, cache, chunks) for cache in (plain, rotated))
    torch.testing.assert_close(found, expected, **CLOSE)
    if budgets:
        pages = [cache.layers[0]._pages for cache in (plain, rotated)]
        assert pages[1].pool.hadamard and not torch.equal(pages[0].pool.k, pages[1].pool.k)
        for one, other in zip(*(x.dense() for x in pages), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


class TestMemory:
    TOKENS, HEADS, DIM, LAYERS = 64, 4, 16, 2

    def held(self, model, lengths, **options):
        """Bytes of the storages behind a cache after a prefill."""
        cache = PagedCache(model.config, page_size=PAGE, **options)
        inputs = batch(lengths, "left")
        forced(model, inputs, cache, [max(lengths)])
        pools = [
            (layer.pool.k, layer.pool.v, *layer.pool.scales.values()) for layer in cache.layers
        ]
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for pool in pools for x in pool if isinstance(x, torch.Tensor)
        }  # fmt: skip
        assert cache.nbytes == sum(storages.values())
        return cache.nbytes

    @pytest.mark.parametrize(
        ("options", "bytes_per_head"),
        [
            ({}, 4 * DIM),
            ({"format": "int8"}, DIM + 4),
            ({"format": "fp8_e5m2"}, DIM + 4),
            ({"format": "int4", "zeros": True}, DIM // 2 + 8),
        ],
        ids=["fp32", "int8", "fp8", "int4-zeros"],
    )
    def test_a_head_takes_its_numbers_and_scales_once(self, llama, options, bytes_per_head):
        rows = self.TOKENS * self.HEADS * self.LAYERS * 2  # 4 KV heads for 6 query heads, K and V
        assert self.held(llama, [self.TOKENS], **options) == rows * bytes_per_head

    def test_padding_takes_none(self, llama):
        assert self.held(llama, [60, 8, 4]) == self.held(llama, [60]) * (60 + 8 + 4) // 60

    def test_behind_a_window_none_is_kept(self):
        """A long prompt takes no more than the window; steps take a page behind it, and spares."""
        model = split(tiny("mistral", sliding_window=8), num_kv_heads=4)
        row = 4 * 16 * 4 * 2 * 2  # bytes of a token: heads, dim, fp32, K and V, layers
        assert self.held(model, [100]) == row * 8
        cache = PagedCache(model.config, page_size=PAGE)
        forced(model, batch([100], "left"), cache, [1] * 100)
        assert cache.nbytes <= row * (8 + 2 * PAGE)

    def test_beams_share_pages(self, llama):
        """Three rows of one prompt of ten pages: the prompt once, and a tail each."""
        cache = PagedCache(llama.config, page_size=PAGE)
        ids = batch([38], "left")["input_ids"]
        with torch.no_grad():
            llama(ids, **{CACHE: cache}, use_cache=True)
            one = cache.nbytes
            cache.batch_repeat_interleave(3)
            logits = llama(ids[:, :1].expand(3, 1), **{CACHE: cache}).logits
        assert cache.nbytes == one // 10 * 12
        torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=0)

    def test_pool_of_fixed_size(self, llama):
        cache = PagedCache(llama.config, page_size=PAGE, num_pages=5)
        ids = batch([21], "left")["input_ids"]
        with torch.no_grad():
            llama(ids[:, :17], **{CACHE: cache}, use_cache=True)
            held = cache.nbytes
            llama(ids[:, 17:20], **{CACHE: cache}, use_cache=True)
            with pytest.raises(OutOfPages, match="1 pages are needed, 0 are free"):
                llama(ids[:, 20:], **{CACHE: cache}, use_cache=True)
        assert cache.nbytes == held


class TestRows:
    """What generation does to a cache between steps."""

    @pytest.mark.parametrize("family", ["llama", "gpt_oss"])
    def test_crop(self, family):
        """Back far behind the window, and a little."""
        model = split(tiny(family), num_kv_heads=4)
        inputs = batch([30, 21], "left")
        cache = PagedCache(model.config, page_size=PAGE)
        cache.activate_past_recording()
        whole = forced(model, inputs, DynamicCache(config=model.config), [30])
        forced(model, inputs, cache, [30])
        for kept in (13, 27):
            cache.crop(kept - 30)
            assert cache.get_seq_length() == kept
            rest = forced(model, inputs, cache, [30 - kept], seen=kept)
            torch.testing.assert_close(rest, whole[last(inputs, 30 - kept)], **CLOSE)

    def test_crop_behind_a_window_is_refused(self):
        model = split(tiny("mistral", sliding_window=8), num_kv_heads=4)
        cache = PagedCache(model.config, page_size=PAGE)
        forced(model, batch([30], "left"), cache, [30])
        with pytest.raises(ValueError, match=r"position 13 must still be stored.*before 23"):
            cache.crop(-10)

    @pytest.mark.parametrize("window", [None, 8])
    def test_prompt_lookup(self, window):
        """Assisted generation: drafts taken from the prompt, rejected ones cropped; what is behind
        the window by then is dropped."""
        if window is not None and installed() < (5, 0):
            pytest.skip("transformers 4 does not announce that it will crop")
        model = split(tiny("mistral", sliding_window=window), num_kv_heads=4)
        ids = batch([9], "left")["input_ids"].repeat(1, 3)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = PagedCache(model.config, page_size=PAGE)
        options = {"max_new_tokens": 30}
        assert generated(model, inputs, cache, prompt_lookup_num_tokens=4, **options) == generated(
            model, inputs, **options
        )
        if window is not None:
            held = cache.tables[window].allocator
            assert held.num_pages - held.num_free_pages <= -(-(window + PAGE + 5) // PAGE)

    def test_rows_taken_twice_or_not(self, llama):
        inputs = batch([14, 9, 5], "left")
        cache = PagedCache(llama.config, page_size=PAGE)
        forced(llama, inputs, cache, [10])
        rows = torch.tensor([2, 0, 2, 2])
        cache.batch_select_indices(rows)
        taken = {name: x[rows] for name, x in inputs.items()}
        taken["input_ids"][3, 10:] = 7  # rows that share pages go apart
        later = forced(llama, taken, cache, [1, 3], seen=10)
        whole = forced(llama, taken, DynamicCache(config=llama.config), [14])
        torch.testing.assert_close(later, whole[last(taken, 4)], **CLOSE)

    def test_going_on_and_starting_anew(self, llama):
        """A second call of generate goes on with the cache of the first; reset forgets it all."""
        inputs = batch([9], "left")
        cache = PagedCache(llama.config, page_size=PAGE)
        first = torch.tensor(generated(llama, inputs, cache))
        more = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        assert generated(llama, more, cache) == generated(llama, more)
        cache.reset()
        assert generated(llama, inputs, cache) == first.tolist()


class TestErrors:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_other_attention(self, implementation):
        model = tiny()
        model.set_attn_implementation(implementation)
        ids = batch([5], "left")["input_ids"]
        with (
            torch.no_grad(),
            pytest.raises(
                (TypeError, AttributeError), match="only be read by attn_implementation='asym_gqa'"
            ),
        ):
            model(ids, **{CACHE: PagedCache(model.config)})

    def test_gradients(self, llama):
        with pytest.raises(ValueError, match=r"call the model under torch\.no_grad"):
            llama(batch([5], "left")["input_ids"], **{CACHE: PagedCache(llama.config)})

    def test_dropout(self):
        model = split(tiny(attention_dropout=0.5), num_kv_heads=4).train()
        with torch.no_grad(), pytest.raises(ValueError, match=r"dropout must be 0 .*got 0\.5"):
            model(batch([5], "left")["input_ids"], **{CACHE: PagedCache(model.config)})

    def test_another_batch(self, llama):
        cache = PagedCache(llama.config)
        with torch.no_grad():
            llama(batch([5, 5], "left")["input_ids"], **{CACHE: cache})
            with pytest.raises(ValueError, match="batch must stay 2, as the cache has it, got 1"):
                llama(batch([1], "left")["input_ids"], **{CACHE: cache})

    def test_another_type(self, llama):
        cache = PagedCache(llama.config)
        ids = batch([5], "left")["input_ids"]
        with torch.no_grad():
            llama(ids, **{CACHE: cache})
            with pytest.raises(ValueError, match=r"keys must have 4 heads of 16 in torch\.float32"):
                llama.double()(ids, **{CACHE: cache})
        llama.float()

    def test_a_mask_that_shows_padding(self, llama):
        inputs = batch([9, 5], "left")
        cache = PagedCache(llama.config)
        forced(llama, inputs, cache, [8])
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"store .*got one that shows"),
        ):
            mask = torch.tensor([[1] * 8 + [0], [1] * 9])
            llama(inputs["input_ids"][:, 8:], attention_mask=mask, **{CACHE: cache})

    def test_layers_that_are_not_attention(self, llama):
        config = type(llama.config)(num_hidden_layers=1, layer_types=["chunked_attention"])
        with pytest.raises(NotImplementedError, match="layer_types with 'chunked_attention'"):
            PagedCache(config)
