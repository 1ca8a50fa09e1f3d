"""Every error that a user can cause, by its message."""

import numpy as np
import pytest
import torch

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.attention import attention_call
from gqa_kernels.call.kind_bits import find_kind
from gqa_kernels.native.schema import FORWARD
from gqa_kernels.testing import make_inputs

MAP = HeadMap([0, 1, 1])
Q, K, V = make_inputs(2, MAP, 4, 5, 8)  # [2, 3, 4, 8], [2, 2, 5, 8]

BAD = {
    "not-a-tensor": (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    "rank": (dict(k=K[0]), ValueError, r"k must have 4 dimensions, got 3 \(shape \(2, 5, 8\)\)"),
    "integer-q": (dict(q=Q.int()), TypeError, "q.dtype must be one of .*, got torch.int32"),
    "complex-q": (dict(q=Q.cfloat()), TypeError, "q.dtype must be one of"),
    "dtype": (dict(v=V.half()), TypeError, r"v.dtype must equal q.dtype \(torch.float32\)"),
    "device": (dict(k=K.to("meta")), ValueError, r"k.device must equal q.device \(cpu\), got meta"),
    "stride": (
        dict(q=torch.randn(2, 3, 8, 4).transpose(2, 3)),
        ValueError,
        r"q.stride\(-1\) must be 1, got 4; call q.contiguous\(\) first",
    ),
    "batch": (dict(k=K[:1]), ValueError, r"k.shape\[0\] must equal q.shape\[0\] \(2\), got 1"),
    "head-dim": (dict(k=K[..., :7]), ValueError, r"k.shape\[3\] must equal q.shape\[3\] \(8\)"),
    "keys": (dict(v=V[:, :, :4]), ValueError, r"v.shape\[2\] must equal k.shape\[2\] \(5\), got 4"),
    "keys-bshd": (
        dict(q=Q.mT.mT, v=V[:, :1], layout="bshd"),
        ValueError,
        r"v.shape\[1\] must equal k.shape\[1\] \(2\), got 1",
    ),
    "value-heads": (dict(v=V[:, :1]), ValueError, r"v.shape\[1\] must equal k.shape\[1\] \(2\)"),
    "no-heads": (
        dict(q=Q[:, :0], head_map=[]),
        ValueError,
        r"q, k and v.shape\[1\] \(heads\) must be at least 1, got 0",
    ),
    "no-kv-heads": (
        dict(k=K[:, :0], v=V[:, :0]),
        ValueError,
        r"v.shape\[1\] \(heads\) must be at least 1, got 3, 0 and 0",
    ),
    "no-head-dim": (
        dict(q=Q[..., :0], k=K[..., :0]),
        ValueError,
        r"k.shape\[3\] \(head dim\) must be at least 1, got 0",
    ),
    "map-length": (dict(head_map=[0, 1]), ValueError, r"one entry per query head \(3\), got 2"),
    "map-empty": (dict(head_map=[]), ValueError, "head_map must have .*got"),
    "map-negative": (
        dict(head_map=[0, -1, 1]),
        ValueError,
        r"\[0, k.shape\[1\] \(2\)\), got -1 at",
    ),
    "map-too-large": (dict(head_map=[0, 2, 1]), ValueError, "got 2 at head 1"),
    "map-tensor-too-large": (dict(head_map=torch.tensor([0, 2, 1])), ValueError, "got 2 at head 1"),
    "map-floats": (dict(head_map=[0.0, 1.0, 1.0]), TypeError, "must be integers, got 0.0"),
    "map-bools": (dict(head_map=[True, False, True]), TypeError, "must be integers, got True"),
    "map-float-tensor": (dict(head_map=torch.zeros(3)), TypeError, "must be an integer tensor"),
    "map-bool-tensor": (
        dict(head_map=torch.zeros(3, dtype=torch.bool)),
        TypeError,
        "must be an integer tensor, got torch.bool",
    ),
    "map-float-array": (dict(head_map=np.zeros(3)), TypeError, "must be integers, got 0.0"),
    "map-2d-array": (dict(head_map=np.zeros((3, 1), int)), TypeError, "must be integers"),
    "map-rank": (
        dict(head_map=torch.zeros(3, 1, dtype=torch.int)),
        ValueError,
        "1 dimension, got 2",
    ),
    "map-tensor-length": (dict(head_map=torch.tensor([0])), ValueError, r"\(3\), got 1"),
    "map-none": (dict(head_map=None), TypeError, "must be a HeadMap, a sequence .*got NoneType"),
    "map-string": (dict(head_map="011"), TypeError, "must be a HeadMap, a sequence .*got str"),
    "map-kv-heads": (
        dict(head_map=HeadMap([0, 1, 2])),
        ValueError,
        r"k.shape\[1\] must equal head_map.num_kv_heads \(3\), got 2",
    ),
    "map-heads": (dict(head_map=HeadMap([0, 1])), ValueError, r"query head \(3\), got 2"),
    "map-device": (
        dict(head_map=torch.zeros(3, dtype=torch.int, device="meta")),
        ValueError,
        r"head_map.device must equal q.device \(cpu\), got meta",
    ),
    "value-map": (
        dict(value_head_map=HeadMap([0, 1, 2])),
        ValueError,
        r"v.shape\[1\] must equal value_head_map.num_kv_heads \(3\), got 2",
    ),
    "layout": (dict(layout="sbhd"), ValueError, "layout must be one of .*, got 'sbhd'"),
    "scale-nan": (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    "softcap-negative": (dict(softcap=-0.5), ValueError, "softcap must be positive, .*got -0.5"),
    "softcap-nan": (dict(softcap=float("nan")), ValueError, "softcap must be finite"),
    "window-int": (dict(window=4), TypeError, r"window must be a pair \(left, right\) or None"),
    "window-three": (dict(window=(1, 2, 3)), ValueError, "window must be a pair"),
    "window-negative": (dict(window=(-2, 0)), ValueError, "window left must be non-negative, or"),
    "window-float": (dict(window=(0, 1.5)), TypeError, "window right must be an integer, got 1.5"),
    "alibi-shape": (
        dict(alibi_slopes=torch.ones(2)),
        ValueError,
        r"\(3,\) or \(2, 3\), got \(2,\)",
    ),
    "alibi-dtype": (
        dict(alibi_slopes=torch.ones(3).int()),
        TypeError,
        "alibi_slopes.dtype must be",
    ),
    "alibi-list": (dict(alibi_slopes=[1.0] * 3), TypeError, "alibi_slopes must be a torch.Tensor"),
    "sinks-shape": (dict(sinks=torch.ones(2, 3)), ValueError, r"sinks must have shape \(3,\), got"),
    "sinks-device": (
        dict(sinks=torch.ones(3, device="meta")),
        ValueError,
        "sinks.device must equal",
    ),
    "mask-shape": (
        dict(attn_mask=torch.ones(4, 6).bool()),
        ValueError,
        r"broadcast to \[B, Hq, Sq, Sk\] = \(2, 3, 4, 5\), got \(4, 6\)",
    ),
    "mask-rank": (
        dict(attn_mask=torch.ones(1, 1, 1, 4, 5)),
        ValueError,
        "attn_mask must broadcast",
    ),
    "mask-integer": (dict(attn_mask=torch.ones(4, 5).int()), TypeError, "must be bool or floating"),
    "mask-list": (
        dict(attn_mask=[[True]]),
        TypeError,
        "attn_mask must be a torch.Tensor, got list",
    ),
    "lengths-shape": (
        dict(kv_lengths=torch.tensor([1])),
        ValueError,
        r"\(2,\) or \(2, 2\), got \(1,\)",
    ),
    "lengths-nan": (dict(kv_lengths=[float("nan"), 1.0]), TypeError, "must be int32 or int64, got"),
    "lengths-float": (dict(kv_lengths=torch.ones(2)), TypeError, "kv_lengths.dtype must be int32"),
    "lengths-too-large": (dict(kv_lengths=[5, 6]), ValueError, r"in \[0, Sk \(5\)\], got 6"),
    "lengths-negative": (dict(kv_lengths=[-1, 5]), ValueError, r"in \[0, Sk \(5\)\], got -1"),
    "backend": (dict(backend="fast"), ValueError, r"backend must be one of \('auto', .*got 'fast'"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_input(change, error, message):
    call = dict(q=Q, k=K, v=V, head_map=MAP) | change
    with pytest.raises(error, match=message):
        asym_gqa_attention(**call)


@pytest.mark.parametrize(
    "head_map",
    [
        [0, 1, 1],
        (0, 1, 1),
        np.array([0, 1, 1]),
        [np.int64(0), np.int32(1), 1],
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 1, 1], dtype=torch.uint8),
        range(2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_forms_of_a_map(head_map):
    if isinstance(head_map, range):  # two heads
        inputs = attention_call(Q[:, :2], K, V, head_map)
        assert inputs.head_map == HeadMap([0, 1])
    else:
        assert attention_call(Q, K, V, head_map).head_map == MAP


def test_normal_form():
    mask = torch.ones(5, dtype=torch.float64)
    inputs = attention_call(
        Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2), MAP, layout="bshd", causal=True,
        window=(3, 7), alibi_slopes=torch.ones(3), attn_mask=mask, kv_lengths=[5, 2],
    )  # fmt: skip
    assert inputs.q.shape == Q.shape and inputs.q.data_ptr() == Q.data_ptr()
    assert inputs.options.window_left == 3
    assert inputs.options.window_right == 0  # causal
    assert inputs.scale == 8**-0.5 and inputs.options.softcap == 0.0
    assert inputs.alibi_slopes.shape == (2, 3)
    assert inputs.attn_mask.shape == (2, 3, 4, 5) and inputs.attn_mask.dtype == torch.float32
    lengths = inputs.kv.kv_lengths
    assert lengths.dtype == torch.int32 and lengths.tolist() == [[5, 5], [2, 2]]
    assert inputs.used == ["window", "alibi", "additive_mask", "kv_lengths"]
    with pytest.raises(AttributeError):
        inputs.options.scale = 1.0


NO_WINDOW = (None, None)


@pytest.mark.parametrize(
    "option, values",
    [
        ("window", [None, NO_WINDOW, (-1, -1), [-1, None], (np.int64(-1), torch.tensor(-1))]),
        (
            "window",
            [(3, 2), (np.int32(3), torch.tensor(2)), [np.uint8(3), torch.tensor(2).short()]],
        ),
        ("window", [(3, None), (3, -1), (torch.tensor(3), -1)]),
        ("softcap", [None, 0.0, 0, np.float32(0), torch.tensor(0.0)]),
        ("softcap", [2.5, np.float64(2.5), torch.tensor(2.5), np.float16(2.5)]),
        ("scale", [2.0, 2, np.float32(2), torch.tensor(2), torch.tensor(2.0).half()]),
        ("dropout_p", [0.0, 0, np.float32(0), torch.tensor(0.0)]),
        ("causal", [True, 1, np.bool_(True), torch.tensor(True)]),
        ("deterministic", [False, 0, np.bool_(False)]),
    ],
)
def test_forms_of_an_option(option, values):
    """FlashAttention's words for off, and every kind of number, mean what Python's do."""
    if option != "deterministic":  # no part of a call: results always are
        calls = [attention_call(Q, K, V, MAP, **{option: x}) for x in values]
        assert all(call.options is calls[0].options for call in calls)
        for name in ("window_left", "window_right", "softcap", "scale", "dropout_p"):
            found = getattr(calls[0].options, name)
            assert found is None or type(found) in (int, float)
    expected = asym_gqa_attention(Q, K, V, MAP, **{option: values[0]})
    for value in values[1:]:
        assert torch.equal(asym_gqa_attention(Q, K, V, MAP, **{option: value}), expected)


def test_stride_of_a_single_element_does_not_matter():
    q = torch.randn(2, 3, 4, 2)[..., :1]
    k, v = torch.randn(2, 2, 5, 2)[..., :1], V
    attention_call(q, k, v, MAP)


def test_kind_of_a_call():
    """What makes a call sets its kind bit by bit; the definition looks at the finished call."""
    seen = {}
    lengths = torch.full((Q.shape[0],), K.shape[2])
    for name, options in {
        "plain": {},
        "sinks": {"sinks": torch.zeros(Q.shape[1])},
        "slopes": {"alibi_slopes": torch.zeros(Q.shape[1])},
        "bool mask": {"attn_mask": torch.ones(1, K.shape[2], dtype=torch.bool)},
        "mask": {"attn_mask": torch.zeros(1, K.shape[2])},
        "mask gradient": {"attn_mask": torch.zeros(1, K.shape[2], requires_grad=True)},
        "lengths": {"kv_lengths": lengths},
        "value map": {"value_head_map": MAP},
    }.items():
        call = attention_call(Q, K, V, MAP, **options)
        assert call.kind == find_kind(call)
        assert seen.setdefault(call.kind, name) == name
    dropping = attention_call(Q, K, V, MAP, dropout_p=0.5).draw_dropout_seed()
    assert dropping.kind == find_kind(dropping) != attention_call(Q, K, V, MAP).kind
    changed = attention_call(Q, K, V, MAP).replace(kv_lengths=lengths, scale=0.5)
    assert changed.kind == attention_call(Q, K, V, MAP, kv_lengths=lengths).kind
    assert changed.options.kind == attention_call(Q, K, V, MAP, scale=0.5).options.kind


@pytest.mark.parametrize("window", [None, (3, None), (3, 1), (None, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_no_argument_of_an_op_is_lost(window, softcap, scale):
    """Arguments with their default value are left out, and nothing else is."""
    call = attention_call(Q, K, V, MAP, window=window, softcap=softcap, scale=scale)
    complete, passed = FORWARD.runner_like(call)(
        lambda *arguments, **named: (FORWARD.Arguments(*arguments, **named), named), call
    )
    for name, value in zip(FORWARD.names, FORWARD.arguments_of(call), strict=True):
        assert getattr(complete, name) is value or getattr(complete, name) == value
    assert ("softcap" in passed) == (softcap is not None)
    assert ("scale" in passed) == (scale is not None)
