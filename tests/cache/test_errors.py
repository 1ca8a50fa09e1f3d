"""Every error that a user of caches can cause, by its message."""

import pytest
import torch

from gqa_kernels import (
    DenseKVCache,
    PagedKVCache,
    asym_gqa_decode,
    asym_gqa_varlen_attention,
    explain_backend,
    merge_attention_states,
    plan_decode,
    shared_prefix_attention,
)
from gqa_kernels.backends.dispatch import BACKENDS

HEADS, DIM = 2, 8
K = torch.randn(5, HEADS, 4, DIM)  # as pages of 4, or as sequences of capacity 4
Q = torch.randn(2, 3, 1, DIM)
MAP = [0, 1, 1]
TABLE = torch.tensor([[0, 3], [4, 1]])
LENGTHS = torch.tensor([7, 2])
INDPTR, INDICES = torch.tensor([0, 2, 3]), torch.tensor([0, 3, 4])
MOST = 2**31 - 1  # differences and sums of such int32 values overflow


def paged(**changes):
    arguments = {"k": K, "v": K, "page_table": TABLE, "lengths": LENGTHS} | changes
    return PagedKVCache(**arguments)


def dense(**changes):
    arguments = {"k": K, "v": K, "lengths": torch.tensor([4, 0, 1, 2, 3])} | changes
    return DenseKVCache(**arguments)


def csr(**changes):
    arguments = {
        "k": K, "v": K, "indptr": INDPTR, "indices": INDICES,
        "last_page_len": torch.tensor([1, 4]),
    } | changes  # fmt: skip
    return PagedKVCache.from_csr(**arguments)


def append(k_new=K[:2], v_new=None, cache=None, **options):
    cache = cache or paged(lengths=torch.zeros(2, dtype=torch.int32))
    return cache.append(k_new, k_new if v_new is None else v_new, **options)


def append_behind(begin):
    """An append to a cache whose begins grew after it was made."""
    begins = torch.zeros(2, dtype=torch.int32)
    cache = paged(lengths=torch.zeros(2, dtype=torch.int32), begin=begins)
    begins.fill_(begin)
    return append(cache=cache)


def decode(q=Q, head_map=MAP, cache=None, **options):
    return asym_gqa_decode(q, paged() if cache is None else cache, head_map, **options)


def varlen(q=K[0], k=K[0], cu_q=(0, 1, 2), cu_k=(0, 2), longest=2, **options):
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    cu_q, cu_k = (x if torch.is_tensor(x) else torch.tensor(x) for x in (cu_q, cu_k))
    return asym_gqa_varlen_attention(q, k, k, [0, 1], cu_q, cu_k, longest, longest, **options)


BAD = {
    "sparse": (
        lambda: paged(k=K.to_sparse()), TypeError, "k.layout must be torch.strided, got torch.spar"
    ),
    "pages-of-one-dim": (
        lambda: paged(v=torch.zeros(7), order="NHD"), ValueError, "must have 4 dim.* got 4 and 1"
    ),
    "rank": (lambda: paged(k=K[0, 0]), ValueError, "k must have 4 dimensions, got 2"),
    "no-tensor": (lambda: paged(k=[1.0]), TypeError, "k must be a torch.Tensor, got list"),
    "no-table": (lambda: paged(page_table=[[0]]), TypeError, "page_table must be a torch.Tensor"),
    "dense-no-tensor": (lambda: dense(v=1, layout="bshd"), TypeError, "v must be a torch.Tensor"),
    "index-rank": (
        lambda: dense(batch_index=torch.tensor(0)), ValueError, "batch_index must have 1 dim",
    ),
    "packed-list": (
        lambda: PagedKVCache.from_packed([1], TABLE, LENGTHS), TypeError, "kv must be a torch",
    ),
    "packed-far-axis": (
        lambda: PagedKVCache.from_packed(K, TABLE, LENGTHS, axis=9), ValueError, "a dim of kv",
    ),
    "varlen-0d": (lambda: varlen(cu_k=torch.tensor(3)), ValueError, "cu_seqlens_k must have shape"),
    "dtype": (lambda: paged(k=K.int(), v=K.int()), TypeError, "k.dtype must be .*torch.int32"),
    "value-dtype": (lambda: paged(v=K.half()), NotImplementedError, "v.dtype must.*uint8.*float16"),
    "pages": (lambda: paged(v=K[:4]), ValueError, r"as many pages or sequences as k \(5\), got 4"),
    "slots": (lambda: paged(v=K[:, :, :3]), ValueError, r"as many slots as k \(4\), got 3"),
    "stride": (lambda: paged(k=K.mT.contiguous().mT), ValueError, r"k.stride\(-1\) must be 1"),
    "no-slots": (lambda: paged(k=K[:, :, :0]), ValueError, "at least one head, slot and column"),
    "order": (lambda: paged(order="DNH"), ValueError, r"order must be one of .*got 'DNH'"),
    "layout": (lambda: dense(layout="bsh"), ValueError, "layout must be one of .*got 'bsh'"),
    "table-dtype": (lambda: paged(page_table=TABLE.float()), TypeError, "int32 or int64, got"),
    "table-shape": (
        lambda: paged(page_table=TABLE[:1]), ValueError, r"\(2, 2, max_pages\).*got \(1, 1, 2\)",
    ),
    "table-empty": (lambda: paged(page_table=TABLE[:, :0]), ValueError, "max_pages at least 1"),
    "table-of-heads": (
        lambda: paged(k=K[:, 0], v=K[:, 0]), ValueError, r"\[B, Hk, max_pages\] where pages",
    ),
    "page-too-large": (
        lambda: paged(page_table=torch.tensor([[0, 5], [4, 9]])), ValueError,
        r"page_table \(or batch_index\) must lie in \[0, 5\), got 5 at sequence 0, head 0, page 1",
    ),
    "page-negative": (
        lambda: paged(page_table=torch.tensor([[0, 1], [-1, 9]])), ValueError,
        "got -1 at sequence 1, head 0, page 0",
    ),
    "batch-index": (
        lambda: dense(batch_index=torch.tensor([0, 1, 2, 7, 4])), ValueError,
        "got 7 at sequence 3, head 0, page 0",
    ),
    "length-too-large": (
        lambda: paged(lengths=torch.tensor([9, 2])), ValueError,
        r"at most the capacity of a sequence \(8 = 2 pages of 4\), got 9",
    ),
    "length-negative": (lambda: paged(lengths=-LENGTHS), ValueError, "non-negative, got -7"),
    "length-shape": (
        lambda: paged(lengths=torch.ones(2, 3).int()), ValueError, r"or \(B, 2\), got \(2, 3\)",
    ),
    "length-type": (lambda: paged(lengths=[7, 2]), TypeError, "lengths must be a torch.Tensor"),
    "dense-batch": (lambda: dense(lengths=LENGTHS), ValueError, r"batch of lengths \(2\).*got 5"),
    "begin": (
        lambda: paged(begin=torch.tensor([2, 0])), ValueError,
        r"begin \+ lengths must be at most .*got 9",
    ),
    "begin-overflow": (
        lambda: paged(begin=torch.tensor([MOST, 0], dtype=torch.int32)), ValueError,
        f"begin . lengths must be at most .*got {MOST + 7}",
    ),
    "begin-negative": (lambda: paged(begin=torch.tensor([-1, 0])), ValueError, "negative, got -1"),
    "begin-shape": (lambda: paged(begin=torch.tensor([0])), ValueError, r"shape \(2,\), got \(1,"),
    "no-scale": (
        lambda: paged(k=K.to(torch.int8), v=K.to(torch.int8)), ValueError,
        "k_scale and v_scale must be given for storage of type torch.int8",
    ),
    "scale-of-plain": (lambda: paged(k_scale=1.0), ValueError, "k_scale must be None for storage"),
    "scale-shape": (
        lambda: paged(k=K.to(torch.int8), v=K.to(torch.int8), k_scale=torch.ones(3), v_scale=1.0),
        ValueError, r"k_scale must have 1 element, shape \(2,\), \(5, 2\) or .*, got \(3,\)",
    ),
    "zero-mixed": (
        lambda: paged(k=K.to(torch.int8), v=K.to(torch.int8), k_scale=torch.ones(5, 2, 4),
                      v_scale=1.0, k_zero=0.0),
        ValueError, "k_scale and k_zero must both be given per token and head, or neither",
    ),
    "format": (
        lambda: PagedKVCache.empty(1, 4, 2, 8, format="int3"), ValueError, "format must be None or",
    ),
    "odd-int4": (
        lambda: PagedKVCache.empty(1, 4, 2, 7, format="int4"), ValueError, "must be even .*got 7",
    ),
    "fp8-zeros": (
        lambda: DenseKVCache.empty(1, 2, 4, 8, format="fp8_e5m2", zeros=True), ValueError,
        "zeros must be False for format 'fp8_e5m2'",
    ),
    "packed-axis": (
        lambda: PagedKVCache.from_packed(K, TABLE, LENGTHS, axis=0), ValueError,
        r"kv.shape\[0\] must be 2 \(K and V\), got 5",
    ),
    "csr-page": (
        lambda: csr(indices=torch.tensor([0, 9, 4])), ValueError, "got 9 at sequence 0",
    ),
    "csr-device": (
        lambda: csr(**{
            name: x.to("meta") for name, x in
            dict(k=K, v=K, indptr=INDPTR, indices=INDICES, last_page_len=LENGTHS).items()
        }),
        ValueError, "max_pages must be given where indptr is on a device",
    ),
    "csr-other-device": (
        lambda: csr(indices=INDICES.to("meta")), ValueError,
        r"indices.device must equal k.device \(cpu\), got meta",
    ),
    "csr-descends": (lambda: csr(indptr=torch.tensor([0, 2, 1])), ValueError, "indptr must ascend"),
    "csr-negative": (
        lambda: csr(indptr=torch.tensor([-3, 2, 3])), ValueError, r"got \[-3, 2, 3\]",
    ),
    "csr-too-large": (
        lambda: csr(indptr=torch.tensor([0, 2, 9])), ValueError, r"\[0, len\(indices\) \(3\)\]",
    ),
    "csr-overflow": (
        lambda: csr(indptr=torch.tensor([0, MOST, -2], dtype=torch.int32)), ValueError,
        "indptr must ascend",
    ),
    "csr-empty": (lambda: csr(indptr=INDPTR[:0]), ValueError, "at least 1 entry, got none"),
    "csr-floats": (lambda: csr(indptr=INDPTR.float()), TypeError, "indptr.dtype must be int32 or"),
    "csr-last": (
        lambda: csr(last_page_len=torch.tensor([1, 5])), ValueError,
        r"last_page_len must lie in \[0, page_size \(4\)\], got 5 at sequence 1",
    ),
    "csr-last-negative": (
        lambda: csr(last_page_len=torch.tensor([-1, 4])), ValueError, "got -1 at sequence 0",
    ),
    "csr-sequences": (
        lambda: csr(last_page_len=torch.tensor([1])), ValueError,
        r"one entry per sequence \(2 by indptr\), got 1",
    ),
    "csr-max-pages": (
        lambda: csr(max_pages=1), ValueError, r"max_pages must be at least 2 .*, got 1",
    ),
    "append-room": (
        lambda: append(cache=paged()), ValueError,
        r"\(8 = 2 pages of 4\), new tokens included, got 11",
    ),
    "append-page": (
        lambda: append(K[:2, :, :1], cache=paged(page_table=torch.tensor([[0, 3], [9, 1]]),
                                                 lengths=torch.tensor([0, 0]))),
        ValueError, "got 9 at sequence 1, head 0, page 0",
    ),
    "append-dtype": (lambda: append(K[:2].half()), TypeError, "k_new.dtype must be torch.float32"),
    "append-shape": (
        lambda: append(v_new=K[:2, :1]), ValueError, r"v_new must have shape \(2, 2, 4, 8\)",
    ),
    "append-packed": (
        lambda: append(K[0].transpose(0, 1), cu_seqlens=torch.tensor([0, 1, 9])), ValueError,
        r"cu_seqlens must ascend from 0 to at most the tokens given \(4\), got \[0, 1, 9\]",
    ),
    "append-overflow": (
        lambda: append(
            K[0].transpose(0, 1), cu_seqlens=torch.tensor([0, MOST, -2], dtype=torch.int32),
        ), ValueError, "cu_seqlens must ascend from 0",
    ),
    "append-begin-overflow": (
        lambda: append_behind(MOST), ValueError, f"new tokens included, got {MOST + 4}",
    ),
    "append-64-bit": (
        lambda: append(K[0].transpose(0, 1), cu_seqlens=torch.tensor([0, 2**62, -(2**62)])),
        ValueError, "cu_seqlens must ascend from 0",
    ),
    "append-q": (lambda: append(q=Q), ValueError, "q must have k_new's dtype and shape"),
    "rotary-one": (lambda: append(rotary_cos=K[0, 0]), ValueError, "must be given together"),
    "rotary-wide": (
        lambda: append(rotary_cos=K[0, 0], rotary_sin=K[0, 0]), ValueError,
        r"of full width .* must have equal columns \(i, i . R / 2\)",
    ),
    "rotary-wider": (
        lambda: append(rotary_cos=torch.ones(4, 9), rotary_sin=torch.ones(4, 9)), ValueError,
        r"with even R <= D \(8\), got \(4, 9\)",
    ),
    "rotary-odd": (
        lambda: append(rotary_cos=torch.ones(4, 7), rotary_sin=torch.ones(4, 7)), ValueError,
        r"with even R <= D \(8\), got \(4, 7\)",
    ),
    "rotary-shapes": (
        lambda: append(rotary_cos=torch.ones(4, 4), rotary_sin=torch.ones(5, 4)), ValueError,
        r"rotary_sin must have the shape of rotary_cos \(\(4, 4\)\), got \(5, 4\)",
    ),
    "rotary-heads": (
        lambda: append(
            cache=paged(lengths=torch.zeros(2, 2).int()), q=K[:2], rotary_cos=torch.ones(4, 4),
            rotary_sin=torch.ones(4, 4),
        ),
        NotImplementedError, "a query has no one position",
    ),
    "cache-type": (lambda: decode(cache=K), TypeError, "must be a DenseKVCache or PagedKVCache"),
    "decode-dtype": (lambda: decode(Q.half()), TypeError, "q.dtype must equal the cache's"),
    "decode-dim": (
        lambda: decode(Q[..., :4]), ValueError, r"the cache's keys \(8\), got 4",
    ),
    "decode-batch": (lambda: decode(Q[:1]), ValueError, r"the cache's batch \(2\), got 1"),
    "decode-map": (lambda: decode(head_map=[0, 2, 1]), ValueError, "got 2 at head 1"),
    "decode-half-append": (lambda: decode(k_new=K[:2, :, :1]), ValueError, "given together, got"),
    "decode-rotary": (
        lambda: decode(rotary_cos=K[0, 0], rotary_sin=K[0, 0]), ValueError, "no k_new to rotate",
    ),
    "decode-packed-mask": (
        lambda: decode(Q[:, :, 0], attn_mask=torch.ones(9), cu_seqlens_q=torch.tensor([0, 1, 2])),
        ValueError, r"attn_mask must broadcast to .* \(2, 3, 1, 8\), got \(9,\)",
    ),
    "decode-packed-longest": (
        lambda: decode(Q[:, :, 0], cu_seqlens_q=torch.tensor([0, 2, 2]), max_seqlen_q=1),
        ValueError, r"max_seqlen_q must be at least .* of cu_seqlens_q \(2\), got 1",
    ),
    "decode-packed-rank": (
        lambda: decode(cu_seqlens_q=torch.tensor([0, 1, 2])), ValueError, "q must have 3 dim",
    ),
    "value-map-of-head-pages": (
        lambda: decode(cache=paged(page_table=TABLE[:, None].repeat(1, 2, 1)),
                       value_head_map=[0, 0, 1]),
        NotImplementedError, "value_head_map must be None where the page table is per head",
    ),
    "value-heads": (
        lambda: decode(cache=paged(v=K[:, :1])), ValueError, "as many value heads as key heads",
    ),
    "planned-cache": (
        lambda: plan_decode(Q, paged(), MAP)(Q, paged(k=K[..., :6], v=K)), ValueError,
        r"k of the cache must be as planned, \(5, 2, 4, 8\)",
    ),
    "planned-q": (
        lambda: plan_decode(Q, paged(), MAP)(Q[:, :2], paged()), ValueError, "q must be as planned",
    ),
    "varlen-offsets": (lambda: varlen(cu_k=(0, 2, 1)), ValueError, "cu_seqlens_k must ascend"),
    "varlen-overflow": (
        lambda: varlen(cu_q=torch.tensor([0, MOST, -2, 2], dtype=torch.int32), cu_k=(0, 0, 1, 2)),
        ValueError, "cu_seqlens_q must ascend",
    ),
    "varlen-overflow-keys": (
        lambda: varlen(cu_k=torch.tensor([0, MOST, -2, 2], dtype=torch.int32), cu_q=(0, 0, 1, 2)),
        ValueError, "cu_seqlens_k must ascend",
    ),
    "varlen-shape": (
        lambda: varlen(), ValueError, r"cu_seqlens_q must have shape \(2,\), got \(3,\)",
    ),
    "varlen-type": (lambda: varlen(cu_k=torch.ones(3)), TypeError, "cu_seqlens_k must be an int32"),
    "prefix-batch": (
        lambda: shared_prefix_attention(Q, paged(), paged(), MAP), ValueError,
        "prefix must hold 1 sequence, got 2",
    ),
    "merge-shape": (
        lambda: merge_attention_states(Q, Q[..., 0], Q[:1], Q[..., 0]), ValueError,
        r"out_b must have out_a's shape \(2, 3, 1, 8\)",
    ),
    "merge-lse": (
        lambda: merge_attention_states(K, K[..., 0].mT, K, K[..., 0].mT), ValueError,
        "lse must fit an output of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_failed_call_appends_nothing():
    cache = paged(k=K.clone(), v=K.clone(), lengths=torch.tensor([3, 2]))
    new = torch.zeros(2, 2, 1, 8)
    for options, error in (
        ({"head_map": [0, 3, 1]}, ValueError),
        ({"k_new": new, "v_new": new, "q": Q[..., :4]}, ValueError),
        ({"k_new": new, "v_new": new, "backend": "none"}, ValueError),
    ):
        with pytest.raises(error):
            decode(**({"cache": cache, "k_new": new, "v_new": new} | options))
    assert torch.equal(cache.k, K) and cache.lengths.tolist() == [3, 2]


def test_garbage_that_is_never_used_is_no_error():
    paged(page_table=torch.tensor([[0, 3, 99], [4, -5, 99]]))
    paged(lengths=torch.tensor([2, 0]), page_table=torch.tensor([[99, 3], [-1, 1]]),
          begin=torch.tensor([4, 0]))  # fmt: skip


def test_explanations_name_the_kind_of_cache():
    cache = DenseKVCache.empty(2, HEADS, 8, 600, dtype=torch.float32)
    q = torch.zeros(2, 3, 1, 600, requires_grad=True)
    reasons = explain_backend(asym_gqa_decode, q, cache, MAP)
    assert reasons["reference"] == []
    for name in ("cpu", "triton"):
        most = BACKENDS[name].capabilities.max_head_dim
        assert f"head dim D = 600 (at most {most})" in reasons[name]
        assert "no backward over a cache, and an input requires grad" in reasons[name]
    with pytest.raises(NotImplementedError, match=r"over dense cache with k .*: head dim D = 600"):
        asym_gqa_decode(q, cache, MAP, backend="cpu")
