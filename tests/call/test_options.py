"""No option is dropped: each changes the result, or is refused. And numbers are interned."""

import inspect

import pytest
import torch

from gqa_kernels import (
    AuxRequest,
    DenseKVCache,
    HeadMap,
    PagedKVCache,
    asym_gqa_attention,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    available_backends,
    plan_decode,
)
from gqa_kernels.call.options import Options
from gqa_kernels.decode import append

MAP, VALUES = HeadMap([0, 1, 1]), HeadMap([1, 0, 1])
DIM, KEYS, QUERIES = 8, 7, 3
# Results are always deterministic: this option has no effect to have.
WITHOUT_EFFECT = {"deterministic"}


def table():
    angle = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    return angle.cos(), angle.sin()


COS, SIN = table()
OPTIONS = {
    "value_head_map": VALUES,
    "causal": None,  # the opposite of the default
    "scale": 0.9,
    "window": (1, 1),
    "softcap": 0.5,
    "alibi_slopes": torch.tensor([0.5, 0.2, 0.9]),
    "sinks": torch.tensor([0.5, 2.0, -1.0]),
    "attn_mask": torch.arange(32) % 2 == 0,
    "key_ranges": torch.tensor([1, 3]).expand(1, 1, QUERIES, 2),
    "kv_lengths": [4],
    "dropout_p": 0.5,
    "batch_invariant": True,  # sums in another order
    "layout": "bshd",
    "return_lse": True,
    "return_aux": AuxRequest(key_scores=2),
    "backend": "no backend of this name",
    "cu_seqlens_q": torch.tensor([0, 2]),
    "cu_seqlens": torch.tensor([0, 2]),
    "max_seqlen_q": 2,
    "max_seqlen": 2,
    "rotary_cos": COS,
    "rotary_sin": SIN,
    "rotary_interleaved": True,
    "rotary_positions": torch.tensor([[4, 2, 9]]),
    "advance": False,
    "k_new": torch.ones(1, 2, QUERIES, DIM),
    "v_new": torch.ones(1, 2, QUERIES, DIM),
    "q": torch.ones(1, 3, QUERIES, DIM),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = randn(1, 3, QUERIES, DIM), randn(1, 2, KEYS, DIM, seed=1), randn(1, 2, KEYS, DIM, seed=2)
NEW = {"k_new": randn(1, 2, QUERIES, DIM, seed=3), "v_new": randn(1, 2, QUERIES, DIM, seed=4)}


def dense():
    k, v = (torch.zeros(1, 2, 32, DIM) for _ in "kv")
    k[:, :, :KEYS], v[:, :, :KEYS] = K, V
    return DenseKVCache(k, v, torch.tensor([KEYS], dtype=torch.int32))


def paged():
    cache = dense()
    k, v = (x.view(2, 8, 4, DIM).transpose(0, 1).contiguous() for x in (cache.k[0], cache.v[0]))
    return PagedKVCache(k, v, torch.arange(8)[None].int(), cache.lengths)


def attention(backend, /, **options):
    return asym_gqa_attention(Q, K, V, MAP, **{"backend": backend, **options})


def varlen(backend, /, **options):
    q, k, v = (x[0].transpose(0, 1) for x in (Q, K, V))
    ends = (torch.tensor([0, 1, QUERIES]), torch.tensor([0, 3, KEYS]))
    if "key_ranges" in options:  # of each sequence
        options["key_ranges"] = options["key_ranges"].expand(2, 1, QUERIES, 2)
    return asym_gqa_varlen_attention(q, k, v, MAP, *ends, 3, 7, **{"backend": backend, **options})


def decode_over(make):
    def decode(backend, /, **options):
        cache = make()
        out = asym_gqa_decode(Q, cache, MAP, **{**NEW, "backend": backend, **options})
        return out, cache.lengths

    return decode


def planned(backend, /, **options):
    cache = paged()
    given = {name: options.pop(name) for name in OF_PLAN & options.keys()}
    return plan_decode(Q, cache, MAP, **{"backend": backend, **given})(Q, cache, **NEW, **options)


def appended(backend, /, **options):
    cache = paged()
    rotated = append(cache, **{**NEW, "backend": backend, "rotary_cos": COS, "rotary_sin": SIN,
                               "q": Q, **options})  # fmt: skip
    return rotated, cache.lengths, cache.k, cache.v


OF_PLAN = set(inspect.signature(asym_gqa_decode).parameters) - {
    "rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_positions", "return_lse",
    "return_aux", "out", "lse", "advance", *NEW,
}  # fmt: skip
CALLS = {
    "attention": (attention, asym_gqa_attention),
    "varlen": (varlen, asym_gqa_varlen_attention),
    "dense": (decode_over(dense), asym_gqa_decode),
    "paged": (decode_over(paged), asym_gqa_decode),
    "append": (appended, append),
}
NAMES = {
    kind: [p.name for p in inspect.signature(of).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for kind, (_, of) in CALLS.items()
}
# Some options of a step are given when the plan is made, the others when it is run.
CALLS["plan"] = (planned, None)
NAMES["plan"] = [name for name in NAMES["paged"] if name not in ("advance", *NEW)]


def outcome(call, backend, /, **options):
    """What a call does: its tensors, or its error."""
    try:
        torch.manual_seed(0)
        found = call(backend, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    flat = []
    for x in found if isinstance(found, tuple) else (found,):
        flat += x if isinstance(x, tuple) else (x,)
    return flat


def same(a, b):
    if isinstance(a, str) or isinstance(b, str) or len(a) != len(b):
        return a is b
    return all(
        x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("kind", CALLS)
def test_each_option_changes_the_result_or_is_refused(kind, backend):
    if backend not in available_backends():
        pytest.skip(f"no backend {backend}")
    call, names = CALLS[kind][0], NAMES[kind]
    without = outcome(call, backend)
    assert not isinstance(without, str), without
    for name in names:
        options = {name: OPTIONS[name]} if name in OPTIONS else {}
        base = without
        if name == "causal":
            options = {name: kind in ("attention", "varlen")}
        if name in ("rotary_interleaved", "rotary_positions") and kind != "append":
            base = outcome(call, backend, rotary_cos=COS, rotary_sin=SIN)
            options |= {"rotary_cos": COS, "rotary_sin": SIN}
        if kind == "append" and name.startswith("rotary_c"):
            options = {"rotary_cos": SIN}
        if kind == "append" and name == "rotary_sin":
            options = {"rotary_sin": COS}
        if name in WITHOUT_EFFECT:
            assert same(outcome(call, backend, **{name: True}), without)
            assert "deterministic must be" in outcome(call, backend, **{name: "x"})
            continue
        if name in ("out", "lse"):
            given = {"return_lse": name == "lse"}
            expected = outcome(call, backend, **given)
            at = ("out", "lse").index(name)
            place = torch.empty_like(expected[at])
            found = outcome(call, backend, **given, **{name: place})
            assert isinstance(found, str) or (found[at] is place and same(found, expected)), name
            continue
        assert options, f"{name} is in no test"
        if name in ("max_seqlen", "max_seqlen_q"):  # of no use without offsets
            continue
        assert not same(outcome(call, backend, **options), base), f"{name} was dropped"


def test_numbers_are_interned():
    one = Options.of(causal=True, scale=2, softcap=3.0)
    assert Options.of(causal=True, scale=2.0, softcap=3) is one
    assert Options.of(window=(None, 0), scale=2.0, softcap=3.0) is one
    assert Options.of(causal=True, scale=2.5, softcap=3.0) is not one
    assert one.used == ("window", "softcap")
    with pytest.raises(TypeError, match="window right must be an integer, got True"):
        Options.of(window=(1, True))
