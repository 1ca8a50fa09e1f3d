"""Random maps, shapes and options: every backend against the reference."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.backends.dispatch import BACKENDS
from gqa_kernels.testing import assert_attention_close, make_inputs
from tests.api.test_attention import USABLE
from tests.conftest import DEVICE
from tests.dense import dense_attention

# The interpreter needs some 0.2 s a call; the others far less. The reference is held to itself in
# fp64 here, and to loops below.
EXAMPLES = {"triton": 30 if DEVICE == "cpu" else 300, "reference": 60}
SLOW_FACTOR = int(os.environ.get("GQA_KERNELS_TEST_EXAMPLES", "1"))


@st.composite
def head_maps(draw, num_heads: int) -> HeadMap:
    num_kv_heads = draw(st.integers(1, 6))
    entries = draw(
        st.lists(st.integers(0, num_kv_heads - 1), min_size=num_heads, max_size=num_heads)
    )
    return HeadMap(entries, num_kv_heads)


@st.composite
def calls(draw, dtypes) -> tuple[tuple, dict]:
    """Arguments and options of a call, on the CPU."""
    heads = draw(st.integers(1, 9))
    head_map = draw(head_maps(heads))
    value_head_map = draw(st.none() | head_maps(heads))
    batch = draw(st.integers(1, 3))
    q_len = draw(st.sampled_from([1, 1, 2, 3, 7, 16, 17, 40, 70]))
    kv_len = draw(st.sampled_from([0, 1, 2, 5, 17, 64, 65, 130]))
    layout = draw(st.sampled_from(["bhsd", "bshd"]))
    seed = draw(st.integers(0, 1000))
    q, k, v = make_inputs(
        batch, head_map, q_len, kv_len, draw(st.sampled_from([1, 8, 16, 33, 64, 80])),
        value_head_dim=draw(st.sampled_from([None, 1, 20, 64])), value_head_map=value_head_map,
        dtype=draw(st.sampled_from(dtypes)), layout=layout, strided=draw(st.booleans()), seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    options = {"layout": layout, "causal": draw(st.booleans())}
    if value_head_map is not None:
        options["value_head_map"] = value_head_map
    if draw(st.booleans()):
        side = st.none() | st.integers(0, 40)
        options["window"] = (draw(side), draw(side))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.floats(0.5, 30))
    if draw(st.integers(0, 3)) == 0:
        options["alibi_slopes"] = random(heads).abs()
    if draw(st.integers(0, 3)) == 0:
        options["sinks"] = 3 * random(heads)
    mask_kind = draw(st.sampled_from([None, None, "bool", "float"]))
    if mask_kind:
        target = (batch, heads, q_len, kv_len)
        shape = [n if draw(st.booleans()) else 1 for n in target]
        mask = random(*shape)
        options["attn_mask"] = (
            mask > -1 if mask_kind == "bool" else mask.masked_fill(mask > 1.5, -torch.inf)
        )
    if draw(st.integers(0, 2)) == 0:
        shape = (batch, head_map.num_kv_heads) if draw(st.booleans()) else (batch,)
        options["kv_lengths"] = torch.randint(0, kv_len + 1, shape, generator=generator)
    return (q, k, v, head_map), options


def to_device(args, options):
    def move(x):
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else x

    return tuple(map(move, args)), {name: move(x) for name, x in options.items()}


@pytest.mark.parametrize("backend", USABLE)
def test_random_calls(backend):
    dtypes = sorted(BACKENDS[backend].capabilities.dtypes, key=str)

    @settings(
        max_examples=SLOW_FACTOR * EXAMPLES.get(backend, 300),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(calls(dtypes))
    def check(call):
        args, options = to_device(*call)
        out, lse = asym_gqa_attention(*args, **options, return_lse=True, backend=backend)
        assert_attention_close(out, *args, lse=lse, **options)

    check()


@settings(max_examples=60, derandomize=True)
@given(calls([torch.float64]))
def test_reference_against_loops(call):
    (q, k, v, head_map), options = call
    out, lse = asym_gqa_attention(
        q, k, v, head_map, **options, return_lse=True, backend="reference"
    )
    if options.pop("layout") == "bshd":
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    expected_out, expected_lse = dense_attention(q, k, v, head_map, **options)
    torch.testing.assert_close(out, torch.from_numpy(expected_out), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, torch.from_numpy(expected_lse), rtol=1e-9, atol=1e-11)
