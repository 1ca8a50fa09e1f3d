"""Every argument of every public function refuses absurd values, in words that name it."""

import inspect
import itertools
import math

import pytest
import torch

import gqa_kernels as g

MAP = g.HeadMap([0, 1, 1])
ERRORS = (TypeError, ValueError, NotImplementedError)


class Endless:
    """Never runs out."""

    def __iter__(self):
        return itertools.repeat(0)


class Odd:
    """An object that no function accepts and whose repr explains nothing."""

    def __repr__(self):
        return "<odd>"


# Made again for each call, because a generator can be read only once.
ABSURD = {
    "None": lambda: None,
    "string": lambda: "x",
    "bytes": lambda: b"x",
    "list of None": lambda: [None, None],
    "list of strings": lambda: ["a", "b"],
    "nested lists": lambda: [[[1], 2], [3]],
    "set": lambda: {1.5},
    "dict": lambda: {"a": 1},
    "object": Odd,
    "function": lambda: print,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "complex": lambda: 1j,
    "half": lambda: 0.5,
    "huge": lambda: 2**70,
    "negative huge": lambda: -(2**70),
    "True": lambda: True,
    "generator": lambda: (x for x in [0.5]),
    "endless": Endless,
    "huge list": lambda: [0] * 2_000_000,
    "huge entries": lambda: [2**70, 2**70],
    "meta": lambda: torch.ones(2, 3, 4, 8, device="meta"),
    "sparse": lambda: torch.ones(2, 3, 4, 8).to_sparse(),
    "sparse vector": lambda: torch.ones(3, dtype=torch.int32).to_sparse(),
    "complex tensor": lambda: torch.ones(2, 3, 4, 8, dtype=torch.complex64),
    "bool tensor": lambda: torch.ones(7, 5, dtype=torch.bool),
    "0-d tensor": lambda: torch.tensor(math.nan),
    "rank 7": lambda: torch.ones(1, 1, 1, 1, 1, 1, 1),
    "meta integers": lambda: torch.zeros(3, dtype=torch.int32, device="meta"),
}


def pages():
    k = torch.randn(5, 2, 4, 8)
    table, lengths = torch.tensor([[0, 3], [4, 1]]), torch.tensor([6, 2])
    return {"k": k, "v": k.clone(), "page_table": table, "lengths": lengths}


def paged():
    return g.PagedKVCache(**pages())


def dense_parts():
    k = torch.randn(2, 2, 9, 8)
    return {"k": k, "v": k.clone(), "lengths": torch.tensor([4, 5], dtype=torch.int32)}


def dense():
    return g.DenseKVCache(**dense_parts())


def queries():
    return torch.randn(2, 3, 1, 8)


def new():
    return torch.randn(2, 2, 1, 8)


def table():
    return torch.ones(16, 4)


def append_arguments():
    return {"k_new": new(), "v_new": new(), "q": queries(), "rotary_cos": table(),
            "rotary_sin": table()}  # fmt: skip


def state():
    return {"out_a": torch.randn(2, 3, 1, 8), "lse_a": torch.randn(2, 3, 1),
            "out_b": torch.randn(2, 3, 1, 8), "lse_b": torch.randn(2, 3, 1)}  # fmt: skip


def packed():
    offsets = torch.tensor([0, 2, 4])
    return {
        "q": torch.randn(4, 3, 8), "k": torch.randn(4, 2, 8), "v": torch.randn(4, 2, 8),
        "head_map": MAP, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone(),
        "max_seqlen_q": 2, "max_seqlen_k": 2,
    }  # fmt: skip


def allocator():
    found = g.PageAllocator(8, 4)
    found.append([found.allocate(), found.allocate()], 6)
    return found


def dense_call():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 5, 8)
    return {"q": q, "k": k, "v": k.clone(), "head_map": MAP}


def decode_call():
    return {"q": queries(), "cache": dense(), "head_map": MAP}


def plan():
    return g.plan_decode(**decode_call())


def explain(function):
    def call(**arguments):
        return g.explain_backend(function, **arguments)

    call.__signature__ = inspect.signature(function)
    return call


# By name: what makes the function, and good arguments of it.
CALLS = {
    "asym_gqa_attention": (lambda: g.asym_gqa_attention, dense_call),
    "explain_backend(attention)": (lambda: explain(g.asym_gqa_attention), dense_call),
    "asym_gqa_varlen_attention": (lambda: g.asym_gqa_varlen_attention, packed),
    "explain_backend(varlen)": (lambda: explain(g.asym_gqa_varlen_attention), packed),
    "asym_gqa_decode": (
        lambda: g.asym_gqa_decode,
        lambda: decode_call() | {"k_new": new(), "v_new": new()},
    ),
    "asym_gqa_decode(rotary)": (
        lambda: g.asym_gqa_decode,
        lambda: decode_call() | {"k_new": new(), "v_new": new(), "rotary_cos": table(),
                                 "rotary_sin": table()},
    ),
    "explain_backend(decode)": (lambda: explain(g.asym_gqa_decode), decode_call),
    "plan_decode": (lambda: g.plan_decode, decode_call),
    "DecodePlan.__call__": (
        plan,
        lambda: {"q": queries(), "cache": dense(), "k_new": new(), "v_new": new(),
                 "rotary_cos": table(), "rotary_sin": table()},
    ),
    "shared_prefix_attention": (
        lambda: g.shared_prefix_attention,
        lambda: {"q": queries(), "suffix": dense(), "head_map": MAP,
                 "prefix": g.DenseKVCache(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8),
                                          torch.tensor([9]))},
    ),
    "merge_attention_states": (lambda: g.merge_attention_states, state),
    "DenseKVCache": (lambda: g.DenseKVCache, dense_parts),
    "DenseKVCache.empty": (
        lambda: g.DenseKVCache.empty,
        lambda: {"batch": 2, "num_kv_heads": 2, "capacity": 4, "head_dim": 8},
    ),
    "DenseKVCache.append": (lambda: dense().append, append_arguments),
    "DenseKVCache.advance": (lambda: dense().advance, lambda: {"tokens": 1}),
    "PagedKVCache": (lambda: g.PagedKVCache, pages),
    "PagedKVCache.empty": (
        lambda: g.PagedKVCache.empty,
        lambda: {"num_pages": 2, "page_size": 4, "num_kv_heads": 2, "head_dim": 8},
    ),
    "PagedKVCache.from_packed": (
        lambda: g.PagedKVCache.from_packed,
        lambda: {"kv": torch.randn(5, 2, 2, 4, 8), "page_table": torch.tensor([[0, 3], [4, 1]]),
                 "lengths": torch.tensor([6, 2])},
    ),
    "PagedKVCache.from_csr": (
        lambda: g.PagedKVCache.from_csr,
        lambda: {"k": torch.randn(5, 2, 4, 8), "v": torch.randn(5, 2, 4, 8),
                 "indptr": torch.tensor([0, 2, 3]), "indices": torch.tensor([0, 3, 4]),
                 "last_page_len": torch.tensor([1, 4])},
    ),
    "PagedKVCache.at": (
        lambda: paged().at,
        lambda: {"page_table": torch.tensor([[0, 3]]), "lengths": torch.tensor([6])},
    ),
    "PagedKVCache.copy_pages": (lambda: paged().copy_pages, lambda: {"copies": [(0, 1)]}),
    "PagedKVCache.append": (lambda: paged().append, append_arguments),
    "HeadMap": (lambda: g.HeadMap, lambda: {"entries": [0, 1], "num_kv_heads": 2}),
    "HeadMap.uniform": (lambda: g.HeadMap.uniform, lambda: {"num_heads": 4, "num_kv_heads": 2}),
    "HeadMap.from_group_sizes": (lambda: g.HeadMap.from_group_sizes, lambda: {"sizes": [2, 1]}),
    "HeadMap.from_groups": (lambda: g.HeadMap.from_groups, lambda: {"groups": [[0, 1], [2]]}),
    "HeadMap.from_json": (lambda: g.HeadMap.from_json, lambda: {"text": MAP.to_json()}),
    "HeadMap.shard": (lambda: MAP.shard, lambda: {"rank": 0, "world": 2}),
    "HeadMap.tensor": (lambda: MAP.tensor, lambda: {"device": "cpu"}),
    "PageAllocator": (lambda: g.PageAllocator, lambda: {"num_pages": 4, "page_size": 2}),
    "PageAllocator.length": (lambda: allocator().length, lambda: {"sequence": 0}),
    "PageAllocator.pages": (lambda: allocator().pages, lambda: {"sequence": 0}),
    "PageAllocator.fork": (lambda: allocator().fork, lambda: {"sequence": 0, "length": 2}),
    "PageAllocator.append": (
        lambda: allocator().append, lambda: {"sequences": [0, 1], "tokens": [1, 2]},
    ),
    "PageAllocator.pages_needed": (
        lambda: allocator().pages_needed, lambda: {"sequences": [0, 1], "tokens": [1, 2]},
    ),
    "PageAllocator.grow": (lambda: allocator().grow, lambda: {"pages": 2}),
    "PageAllocator.discard": (
        lambda: allocator().discard, lambda: {"sequence": 0, "tokens": 4},
    ),
    "PageAllocator.truncate": (
        lambda: allocator().truncate, lambda: {"sequence": 0, "length": 1},
    ),
    "PageAllocator.free": (lambda: allocator().free, lambda: {"sequence": 0}),
    "PageAllocator.batch": (
        lambda: allocator().batch, lambda: {"sequences": [0, 1], "max_pages": 3},
    ),
}  # fmt: skip


def arguments_of(function) -> list[str]:
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            names.append(name)
    return names


def pairs():
    for name, (make, _) in CALLS.items():
        for argument in arguments_of(make()):
            if not (name.startswith("explain") and argument in NOT_LOOKED_AT):
                yield name, argument


def named(argument, message) -> bool:
    return argument in message or CALLED.get(argument, argument) in message


# Values that an argument takes, besides its default.
TAKEN = {
    "scale": {"half", "huge", "negative huge"},
    "softcap": {"half", "huge"},
    "dropout_p": {"half"},
    "causal": {"True"},
    "return_lse": {"True"},
    "deterministic": {"True"},
    "batch_invariant": {"True"},
    "advance": {"True"},
    "rotary_interleaved": {"True"},
    "zeros": {"True"},
    "hadamard": {"True"},
    "max_seqlen_q": {"huge", "None"},
    "max_seqlen_k": {"huge", "None"},
    "max_seqlen": {"huge"},
    "window": {"list of None", "huge entries"},
    "attn_mask": {"0-d tensor"},
    "page_size": {"huge"},
    "sequences": {"huge list"},  # of one sequence, which a batch may repeat
    "tokens": {"huge", "huge entries"},  # OutOfPages, or a count
}
# What a message calls an argument, if not by its name.
CALLED = {
    "entries": "head_map", "text": "HeadMap JSON", "sequences": "sequence",
    "batch_index": "page_table", "cu_seqlens": "dimensions", "cu_seqlens_q": "dimensions",
}  # fmt: skip
NOT_LOOKED_AT = {"backend", "return_lse", "out", "lse", "deterministic", "advance", "k_new",
                 "v_new", "rotary_cos", "rotary_sin", "rotary_interleaved",
                 "rotary_positions"}  # fmt: skip


@pytest.mark.parametrize("name, argument", pairs(), ids=lambda x: x)
def test_absurd_values(name, argument):
    make, good = CALLS[name]
    function = make()
    default = inspect.signature(function).parameters[argument].default
    make()(**good())  # what is spoilt is right
    wrong = []
    for kind, value in ABSURD.items():
        if kind in TAKEN.get(argument, ()):
            continue
        if default is None and kind == "None":
            continue
        arguments = good()
        arguments[argument] = value()
        try:
            make()(**arguments)
        except ERRORS as error:
            message = str(error)
            if not named(argument, message) or len(message) > 2000:
                wrong.append(f"{kind}: doesn't name it: {message[:200]}")
            elif "Declaration:" in message or "gqa_kernels::" in message:
                wrong.append(f"{kind}: prints a schema: {message[:200]}")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
        else:
            wrong.append(f"{kind}: is taken")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize("call", [dense_call, packed])
def test_one_meta_tensor_is_refused_after_good_calls(call, argument):
    """Torch runs an op with any meta tensor by its fake kernel, which computes nothing."""
    function = g.asym_gqa_attention if call is dense_call else g.asym_gqa_varlen_attention
    arguments = call()
    function(**arguments)
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match="device"):
        function(**arguments)


@pytest.mark.parametrize("argument", ["k_new", "v_new", "q"])
def test_one_meta_tensor_is_refused_after_good_appends(argument):
    arguments = append_arguments()
    dense().append(**arguments)
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match="device"):
        dense().append(**arguments)


OFFSETS = torch.tensor([0, 3])
WITHOUT_NUMBERS = {
    "dense": lambda k, v, k_of, v_of: g.asym_gqa_attention(k[None], k[None], v[None], [0]),
    "dense, bshd": lambda k, v, k_of, v_of: g.asym_gqa_attention(
        *(x[None].transpose(1, 2) for x in (k, k, v)), [0], layout="bshd"
    ),
    "varlen": lambda k, v, k_of, v_of: g.asym_gqa_varlen_attention(
        *(x.transpose(0, 1) for x in (k, k, v)), [0], OFFSETS, OFFSETS, 3, 3
    ),
    "dense cache": lambda k, v, k_of, v_of: g.DenseKVCache(k[None], v[None], torch.tensor([3])),
    "empty dense cache": lambda k, v, k_of, v_of: g.DenseKVCache.empty(
        1, 1, 3, k_of, value_head_dim=v_of
    ),
    "paged cache": lambda k, v, k_of, v_of: g.PagedKVCache(
        k[None], v[None], torch.tensor([[0]]), torch.tensor([3])
    ),
    "empty paged cache": lambda k, v, k_of, v_of: g.PagedKVCache.empty(
        1, 4, 1, k_of, value_head_dim=v_of
    ),
    "append": lambda k, v, k_of, v_of: g.asym_gqa_decode(
        torch.randn(1, 1, 1, 8), g.DenseKVCache.empty(1, 1, 3, 8, dtype=torch.float32), [0],
        k_new=k[None, :, :1], v_new=v[None, :, :1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", WITHOUT_NUMBERS)
@pytest.mark.parametrize("k_of, v_of", [(0, 8), (8, 0), (0, 0)])
def test_vectors_without_numbers(call, k_of, v_of):
    with pytest.raises(ValueError) as error:
        WITHOUT_NUMBERS[call](torch.randn(1, 3, k_of), torch.randn(1, 3, v_of), k_of, v_of)
    assert "csrc" not in str(error.value)


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_result_that_does_not_fit_is_named(return_lse):
    q, k = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**40, 8), torch.zeros(1, 1, 3, 8)
    size = r"shape \(1, 1, 1099511627776, 8\) of Float, 3.277e\+04 GiB"
    with pytest.raises(RuntimeError, match=f"can't allocate memory for the output of .*{size}"):
        g.asym_gqa_attention(q, k, k, [0], return_lse=return_lse, backend="cpu")


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "attn_mask"])
def test_sparse_tensors_are_refused(name):
    x = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=f"{name}.layout must be torch.strided"):
        g.asym_gqa_decode(queries(), dense(), [0, 1, 1], **{name: x})
