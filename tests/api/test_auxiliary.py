"""return_aux: scores of keys and heads against probabilities written out by hand."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest as TorchRequest

from gqa_kernels import (
    AuxOutput,
    AuxRequest,
    asym_gqa_attention,
    asym_gqa_decode,
    available_backends,
    plan_decode,
)
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.reference.cache import gather
from gqa_kernels.decode import decode_call
from gqa_kernels.testing import assert_auxiliary_close, make_inputs
from tests.cache.test_decode import filled, queries
from tests.cases.attention import UNEVEN, WITH_EMPTY
from tests.cases.caches import Kind
from tests.dense import dense_attention

BACKENDS = available_backends()
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (5, None)},
    "scores": {"softcap": 2.0, "scale": 0.4, "alibi_slopes": torch.linspace(0.1, 0.9, 6)},
    "sinks": {"sinks": torch.linspace(-2, 3, 6), "causal": True},
    "mask": {"attn_mask": torch.arange(19) % 3 > 0},
    "lengths": {"kv_lengths": torch.tensor([[19, 4, 0], [2, 7, 19]]), "causal": True},
}


def probabilities(q, k, head_map, **options):
    """``[B, Hq, Sq, Sk]``: attention over values that are the unit vectors."""
    batch, heads, keys, _ = k.shape
    unit = torch.eye(keys).expand(batch, heads, keys, keys)
    out, _ = dense_attention(q, k, unit, head_map, **options)
    return torch.from_numpy(out)


def summed(p, head_map, heads, last):
    found = torch.zeros(p.shape[0], heads, p.shape[3], dtype=torch.float64)
    for h, kv in enumerate(head_map):
        found[:, kv] += p[:, h, -last:].sum(1)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("last", [1, 4, 100])
def test_key_scores_are_sums_of_probabilities(name, last, backend, device):
    head_map, options = UNEVEN, OPTIONS[name]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 9, 16, generator=generator)
    k, v = torch.randn(2, 2, 3, 19, 16, generator=generator)
    expected = summed(probabilities(q, k, head_map, **options), head_map, 3, last)
    on = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (q, k, v, head_map)]
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    plain = asym_gqa_attention(*on, backend=backend, **options)
    out, aux = asym_gqa_attention(
        *on, return_aux=AuxRequest(key_scores=last), backend=backend, **options
    )
    assert torch.equal(out, plain) and aux.lse is None and aux.max_scores is None
    exact = AuxOutput(key_scores=expected.to(device))
    assert_auxiliary_close(aux, attention_call(*on, **options), last, exact)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("name", OPTIONS)
def test_max_scores_are_the_largest(name, backend):
    """A key's score is the LSE of attention to it alone, without sinks."""
    options = {key: x for key, x in OPTIONS[name].items() if key not in ("sinks", "attn_mask")}
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 6, 300, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, 19, 8, generator=generator)
    mask = OPTIONS[name].get("attn_mask", torch.ones(19, dtype=torch.bool))
    alone = torch.stack([
        asym_gqa_attention(
            q.double(), k.double(), v.double(), UNEVEN, return_lse=True,
            attn_mask=mask & (torch.arange(19) == j), backend="reference", **options,
        )[1]
        for j in range(19)
    ])  # fmt: skip
    given = {**options, **({"attn_mask": mask} if name == "mask" else {})}
    if name == "sinks":
        given["sinks"] = OPTIONS[name]["sinks"]
    _, aux = asym_gqa_attention(
        q, k, v, UNEVEN, return_aux=AuxRequest(lse=True, max_scores=True), backend=backend, **given
    )
    exact = AuxOutput(max_scores=alone.amax((0, 3)))
    assert_auxiliary_close(aux, attention_call(q, k, v, UNEVEN, **given), exact=exact)
    assert aux.lse.shape == (2, 6, 300) and aux.key_scores is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Kind(), Kind(3, "NHD"), Kind(16, format="int8")], ids=str)
def test_over_caches(kind, backend, device):
    """New tokens count as keys; what is beyond a length has no score."""
    dtype = torch.float32
    cache, _ = filled(kind, dtype, device, room=True)
    q = queries(3, UNEVEN, 2, 16, dtype, device)
    new = [torch.randn(3, n, 2, dim, device=device) for n, dim in ((3, 16), (3, 24))]
    plan = plan_decode(q, cache, UNEVEN, backend=backend)
    out, aux = asym_gqa_decode(
        q, cache, UNEVEN, k_new=new[0], v_new=new[1], backend=backend, advance=False,
        return_aux=AuxRequest(lse=True, key_scores=2),
    )  # fmt: skip
    planned, again = plan(q, cache, *new, return_aux=AuxRequest(True, True, 2))
    assert torch.equal(out, planned) and torch.equal(aux.key_scores, again.key_scores)
    cache.advance(2)
    call = decode_call(q, cache, UNEVEN)
    assert_auxiliary_close(again, call, 2)
    k, _, _ = gather(cache.view())
    lengths = cache.lengths.cpu()
    p = probabilities(q, k.float(), UNEVEN, causal=True, kv_lengths=lengths)
    exact = AuxOutput(key_scores=summed(p, UNEVEN, 3, 2).to(device))
    assert_auxiliary_close(aux, call, 2, exact)
    assert aux.lse.shape == (3, 6, 2) and again.max_scores.shape == (3, 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_16_bits(options, q_len, backend, device):
    """Kernels may keep scores in other units where nothing but the scale changes them."""
    q, k, v = make_inputs(2, UNEVEN, q_len, 70, 16, dtype=torch.bfloat16, device=device)
    options = {"causal": True, **options}
    request = AuxRequest(max_scores=True, key_scores=2)
    _, aux = asym_gqa_attention(q, k, v, UNEVEN, return_aux=request, backend=backend, **options)
    assert_auxiliary_close(aux, attention_call(q, k, v, UNEVEN, **options), 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_queries(backend, device):
    """The last queries of each sequence, of which some have fewer or none."""
    cache, _ = filled(Kind(3), torch.float32, device)
    counts = [5, 0, 1]
    offsets = torch.tensor([0, 5, 5, 6], device=device)
    q = torch.randn(6, 6, 16, device=device)
    request = AuxRequest(lse=True, max_scores=True, key_scores=3)
    _, aux = asym_gqa_decode(
        q, cache, UNEVEN, cu_seqlens_q=offsets, max_seqlen_q=5, return_aux=request,
        backend=backend,
    )  # fmt: skip
    assert aux.lse.shape == (6, 6)
    exact = torch.zeros(aux.key_scores.shape, dtype=torch.float64)
    k, _, _ = gather(cache.view())
    for b, count in enumerate(counts):
        one = q[offsets[b] : offsets[b] + count].transpose(0, 1)[None]
        if not count:
            assert not aux.key_scores[b].any() and (aux.max_scores[b] == -math.inf).all()
            continue
        p = probabilities(
            one, k[b : b + 1], UNEVEN, causal=True, kv_lengths=cache.lengths[b : b + 1].cpu()
        )
        exact[b] = summed(p, UNEVEN, 3, 3)[0]
    call = decode_call(q, cache, UNEVEN, cu_seqlens_q=offsets, max_seqlen_q=5)
    assert_auxiliary_close(aux._replace(max_scores=None), call, 3, AuxOutput(key_scores=exact))


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps(backend):
    """Empty groups get nothing; a head whose entry is out of range gives nothing."""
    q, k = torch.randn(1, WITH_EMPTY.num_heads, 2, 8), torch.randn(1, WITH_EMPTY.num_kv_heads, 5, 8)
    request = AuxRequest(max_scores=True, key_scores=2)
    _, aux = asym_gqa_attention(q, k, k, WITH_EMPTY, return_aux=request, backend=backend)
    assert_auxiliary_close(aux, attention_call(q, k, k, WITH_EMPTY), 2)
    for g, size in enumerate(WITH_EMPTY.group_sizes):
        assert aux.key_scores[:, g].any() == (size > 0)
    assert 0 in WITH_EMPTY.group_sizes
    _, aux = asym_gqa_attention(q, k, k, WITH_EMPTY, return_aux=TorchRequest(lse=True))
    assert aux.lse is not None and aux.key_scores is None


@pytest.mark.parametrize(
    "request_, error, message",
    [
        (True, TypeError, "return_aux must be an AuxRequest or None, got True"),
        (AuxRequest(key_scores=-1), ValueError, "key_scores must be non-negative, got -1"),
        (AuxRequest(key_scores=1.5), TypeError, "key_scores must be an integer, got 1.5"),
        (AuxRequest(lse="yes"), TypeError, "return_aux.lse must be True or False"),
    ],
)
def test_bad_requests(request_, error, message):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(error, match=message):
        asym_gqa_attention(q, q, q, [0, 1], return_aux=request_)
    with pytest.raises(ValueError, match="return_lse must be False with return_aux"):
        asym_gqa_attention(q, q, q, [0, 1], return_lse=True, return_aux=AuxRequest())
