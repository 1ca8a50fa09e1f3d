"""What is particular to the Triton kernels; the cases that all backends share are elsewhere."""

import pytest
import torch

pytest.importorskip("triton")

from gqa_kernels import HeadMap, asym_gqa_attention
from gqa_kernels.attention import attention_call
from gqa_kernels.backends.triton import TritonBackend, configs
from gqa_kernels.backends.triton.plan import plan_for
from gqa_kernels.backends.triton.splits import blocks_per_part, choose_parts, choose_splits
from gqa_kernels.native import env
from gqa_kernels.native.schema import FORWARD
from gqa_kernels.testing import assert_attention_close, make_inputs
from tests.cases.attention import LARGE_GROUP, UNEVEN
from tests.conftest import DEVICE

usable = TritonBackend().unavailable_reason() is None
pytestmark = pytest.mark.skipif(not usable, reason="no GPU, and the interpreter is off")


def call_of(q, k, v, head_map, **options):
    """The op's arguments, wrapped as the launch code takes them."""
    import gqa_kernels.backends.triton.ops  # noqa: F401  (patches the interpreter)
    from gqa_kernels.backends.triton.launch.forward import ForwardCall
    from gqa_kernels.native.schema import empty_output

    x = attention_call(q, k, v, head_map, **options)
    lse = q.new_empty(x.q.shape[:3], dtype=torch.float32)
    call = ForwardCall(
        x.q, x.k, x.v, plan_for(x), x.alibi_slopes, x.sinks, x.attn_mask, x.kv.kv_lengths, x.scale,
        x.options.window_left, x.options.window_right, x.options.softcap,
        x.options.dropout_p, x.dropout_seed, empty_output(x.q, x.value_head_dim, x.bshd), lse,
    )  # fmt: skip
    return call


@pytest.mark.parametrize(
    "num_splits, kv_len",
    [(1, 300), (2, 300), (3, 300), (9, 300), pytest.param(64, 4100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("q_len", [1, 5])
def test_any_number_of_splits(num_splits, kv_len, q_len):
    """More splits than key blocks included: the surplus ones contribute nothing."""
    from gqa_kernels.backends.triton.launch.forward import decode_launches

    q, k, v = make_inputs(2, UNEVEN, q_len, kv_len, 32, device=DEVICE)
    options = {
        "causal": True,
        "window": (kv_len - 50, None),
        "sinks": torch.linspace(-2, 3, 6, device=DEVICE),
        "kv_lengths": torch.tensor([kv_len, 3], device=DEVICE),
    }
    call = call_of(q, k, v, UNEVEN, **options)
    config = configs.decode_config(call.shape, configs.device_facts(q.device), num_splits)
    launches = decode_launches(call, config)
    assert len(launches) == (1 if num_splits == 1 else 2)
    for launch in launches:
        launch.run()
    assert_attention_close(call.out, q, k, v, UNEVEN, lse=call.lse, **options)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("per_head", [False, True])
def test_sequences_are_cut_by_their_lengths(q_len, per_head):
    """One long sequence, an empty one, and short ones; surplus parts write nothing."""
    from gqa_kernels.backends.triton.launch.forward import decode_launches

    q, k, v = make_inputs(4, UNEVEN, q_len, 500, 16, dtype=torch.bfloat16, device=DEVICE)
    lengths = torch.tensor([7, 500, 0, 130], dtype=torch.int32, device=DEVICE)
    if per_head:
        lengths = lengths[:, None] // torch.tensor([1, 3, 2], device=DEVICE)
    options = {
        "causal": True,
        "sinks": torch.linspace(-2, 3, 6, device=DEVICE),
        "kv_lengths": lengths,
    }
    call = call_of(q, k, v, UNEVEN, **options)
    config = configs.decode_config(call.shape, configs.device_facts(q.device))
    launches = decode_launches(call, config)
    for launch in launches:
        launch.run()
    first_and_count = launches[0].arguments["p_parts"].tolist()
    counts = [count for _, count in first_and_count]
    assert counts[1] > 1 and counts[0] == counts[2] == 1
    assert [first for first, _ in first_and_count] == [sum(counts[:i]) for i in range(4)]
    assert sum(counts) < config.parts.most_parts
    assert_attention_close(call.out, q, k, v, UNEVEN, lse=call.lse, **options)


@pytest.mark.parametrize("batch", [2, 130])
def test_parts_cover_all_sequences(batch):
    """The parts that programs find on the device are those of the Python rule, for any lengths."""
    import triton
    import triton.language as tl

    import gqa_kernels.backends.triton.ops  # noqa: F401
    from gqa_kernels.backends.triton.kernels.arguments import PerHead
    from gqa_kernels.backends.triton.kernels.parts import find_part

    @triton.jit
    def found(lengths, p_out, batch, num_lengths, kv_len, even_parts, most_blocks):
        i_part = tl.program_id(0)
        i_b, i_split, num_splits = find_part(
            lengths, i_part, batch, num_lengths, kv_len, even_parts, most_blocks, 64
        )
        tl.store(p_out + 3 * i_part, i_b)
        tl.store(p_out + 3 * i_part + 1, i_split)
        tl.store(p_out + 3 * i_part + 2, num_splits)

    globals().update(tl=tl, find_part=find_part)  # where Triton looks names up
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 300, (batch, 2), generator=generator, dtype=torch.int32)
    lengths[batch // 2] = 5000
    choice = choose_parts(batch, tiles=3, num_blocks=80, num_slots=12)
    out = torch.full((choice.most_parts, 3), -7, dtype=torch.int32, device=DEVICE)
    on_device = lengths.to(DEVICE)
    found[(choice.most_parts,)](
        PerHead(on_device, *on_device.stride()), out, batch, 2, 6000, choice.even_parts, 80
    )
    blocks = [min(-(-n // 64), 80) for n in lengths.amax(1).tolist()]
    of_part = blocks_per_part(sum(blocks), choice.even_parts)
    expected = []
    for i_b, count in enumerate(blocks):
        splits = max(1, -(-count // of_part))
        expected += [[i_b, i_split, splits] for i_split in range(splits)]
    assert len(expected) <= choice.most_parts
    assert out[: len(expected)].tolist() == expected
    assert (out[len(expected) :, 0] == -1).all()


def test_programs_per_multiprocessor_follow_from_the_device():
    shape = configs.Shape(1, 32, 8, 1, 8192, 128, 128, 2)
    tile = configs.Tile(16, 64, 4, 3)  # 96 KiB of K and V
    kib = 1024
    for shared, registers, programs in [(228, 65536, 2), (100, 65536, 1), (64, 65536, 1),
                                        (400, 131072, 4)]:  # fmt: skip
        facts = configs.DeviceFacts("sm90", 132, 50 << 20, shared * kib, registers)
        assert configs.programs_per_sm(tile, shape, facts) == programs


@pytest.mark.parametrize("scale", [0.0, -2.0])
@pytest.mark.parametrize("q_len", [1, 33])
def test_scales_that_are_not_positive(q_len, scale):
    """The scale is part of the exponent's multiply-add; hidden keys stay hidden, whatever it is."""
    q, k, v = make_inputs(2, UNEVEN, q_len, 70, 32, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 41])[:, None].expand(2, UNEVEN.num_kv_heads)
    options = {"causal": True, "scale": scale, "kv_lengths": lengths}
    out, lse = asym_gqa_attention(q, k, v, UNEVEN, return_lse=True, backend="triton", **options)
    assert_attention_close(out, q, k, v, UNEVEN, lse=lse, **options)


@pytest.mark.parametrize("q_len", [1, 3])
def test_group_larger_than_a_tile(q_len):
    """34 heads of one group with 3 query tokens are more rows than any decode tile has."""
    q, k, v = make_inputs(1, LARGE_GROUP, q_len, 90, 16, dtype=torch.bfloat16, device=DEVICE)
    out, lse = asym_gqa_attention(q, k, v, LARGE_GROUP, return_lse=True, backend="triton")
    assert_attention_close(out, q, k, v, LARGE_GROUP, lse=lse)


def without_tensors(x):
    """A launch's arguments, as strings, less the tensors."""
    if isinstance(x, dict):
        return str({name: without_tensors(value) for name, value in x.items()})
    if isinstance(x, tuple):
        return str([without_tensors(member) for member in x])
    return "tensor" if torch.is_tensor(x) else str(x)


@pytest.mark.parametrize("q_len", [1, 4, 200])
def test_launches_do_not_depend_on_the_map(q_len):
    """Grids and compile-time choices follow from shapes: what CUDA graphs and device maps need."""
    from gqa_kernels.backends.triton.launch.forward import forward_launches

    seen = set()
    for entries in ([0] * 12, [2] * 12, [0, 1, 2] * 4, [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]):
        head_map = HeadMap(entries, 3)
        q, k, v = make_inputs(2, head_map, q_len, 500, 16, device=DEVICE)
        launches = forward_launches(
            call_of(q, k, v, head_map, causal=True), configs.device_facts(q.device)
        )
        seen.add(
            tuple(
                (
                    launch.grid,
                    without_tensors(launch.arguments),
                )
                for launch in launches
            )
        )
    assert len(seen) == 1


def test_kernels_have_few_parameters():
    """Options come as tuples: a new one adds a member or one parameter, in one place."""
    import gqa_kernels.backends.triton.ops  # noqa: F401
    from gqa_kernels.backends.triton.kernels import (
        append,
        backward_kv,
        backward_q,
        combine,
        common,
        decode,
        delta,
        prefill,
    )  # fmt: skip

    counts = {
        name: len(function.arg_names)
        for module in (append, backward_kv, backward_q, combine, common, decode, delta, prefill)
        for name, function in vars(module).items()
        if hasattr(function, "arg_names")
    }
    assert {"prefill_kernel", "decode_kernel", "append_kernel", "attend"} <= counts.keys()
    assert max(counts.values()) <= 40, counts
    assert counts["attend"] <= 20


@pytest.mark.parametrize("family", ["sm80", "sm86", "sm90", "sm100", "gfx9"])
def test_row_tiles_suffice_for_every_map(family):
    """The grid bound against the worst maps there are, for many shapes."""
    facts = configs.DeviceFacts(family, num_sms=100, l2_bytes=1 << 22)
    for heads, groups, q_len in [(1, 1, 1), (9, 5, 1), (32, 8, 16), (33, 2, 3), (6, 6, 7)]:
        shape = configs.Shape(1, heads, groups, q_len, 1000, 64, 64, 2)
        config = configs.decode_config(shape, facts)
        block = config.tile.block_m
        for used in range(1, min(heads, groups + 1) + 1):  # groups of one head, and one of the rest
            sizes = [1] * (used - 1) + [heads - used + 1]
            assert sum(-(-size * q_len // block) for size in sizes) <= config.num_tiles


def test_device_map_is_read_on_the_device():
    """A map in a tensor, with entries out of range: NaN for those heads, the others unchanged."""
    from gqa_kernels.backends.triton.ops import triton_attention_forward
    from gqa_kernels.backends.triton.plan import build_plan

    for q_len in (1, 20):
        q, k, v = make_inputs(1, UNEVEN, q_len, 40, 16, device=DEVICE)
        head_map = torch.tensor([0, 3, 1, -1, 2, 2], device=DEVICE)
        plan = build_plan(head_map, 3, None, 3)
        out, lse = triton_attention_forward(q, k, v, plan, scale=0.25, window_right=0)
        assert out[:, [1, 3]].isnan().all() and lse[:, [1, 3]].isnan().all()
        good = [0, 2, 4, 5]
        assert_attention_close(
            out[:, good], q[:, good], k, v, [0, 1, 2, 2], lse=lse[:, good], causal=True
        )


def op_arguments(q_len: int, everything: bool, bshd: bool):
    options = {}
    if everything:
        options = {
            "window": (20, 2),
            "softcap": 2.0,
            "alibi_slopes": torch.rand(6, device=DEVICE),
            "sinks": torch.rand(6, device=DEVICE),
            "attn_mask": torch.rand(q_len, 9, device=DEVICE) > 0.2,
            "kv_lengths": torch.tensor([4, 9], device=DEVICE),
            "value_head_map": HeadMap([0, 1, 2, 0, 1, 2]),
        }
    q, k, v = make_inputs(2, UNEVEN, q_len, 9, 16, device=DEVICE)
    x = attention_call(q, k, v, UNEVEN, **options).replace(bshd=bshd)
    arguments = FORWARD.Arguments(*FORWARD.arguments_of(x))
    return tuple(arguments._replace(head_map=plan_for(x)))


@pytest.mark.parametrize("bshd", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("q_len", [1, 33])
def test_opcheck(q_len, everything, bshd):
    from gqa_kernels.backends.triton.ops import triton_attention_forward

    torch.library.opcheck(triton_attention_forward, op_arguments(q_len, everything, bshd))


def test_splits_fill_the_device_and_no_more():
    assert choose_splits(num_programs=1000, num_blocks=64, num_slots=264).num_splits == 1
    assert choose_splits(num_programs=8, num_blocks=2, num_slots=264).num_splits == 1
    few = choose_splits(num_programs=8, num_blocks=1024, num_slots=264)
    assert few.num_splits > 8 and few.efficiency > 0.8
    assert few.num_splits * few.blocks_per_split >= 1024
    for programs in range(1, 300, 7):
        for blocks in (0, 1, 2, 3, 50, 1000):
            choice = choose_splits(programs, blocks, 264)
            assert choice.num_splits >= 1
            assert choice.num_splits * choice.blocks_per_split >= blocks
    assert "num_splits=" in repr(few)


@pytest.mark.skipif(not env.triton_interpreter(), reason="no interpreter in use")
def test_interpreter_rounds_to_bf16_as_torch_does():
    from gqa_kernels.backends.triton.interpreter import bf16_to_fp32, fp32_to_bf16

    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int64) * 65536 + 32768).to(torch.int32)
    values = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    expected = values.to(torch.bfloat16)
    rounded = torch.from_numpy(fp32_to_bf16(values.numpy()).copy()).view(torch.bfloat16)
    assert torch.equal(rounded.isnan(), expected.isnan())
    real = ~expected.isnan()
    assert torch.equal(rounded[real].view(torch.int16), expected[real].view(torch.int16))
    wide = torch.from_numpy(bf16_to_fp32(rounded.view(torch.uint16).numpy()).copy())
    assert torch.equal(wide[real], expected[real].float())


def test_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "set TRITON_INTERPRET=1" in TritonBackend().unavailable_reason()
    q, k, v = make_inputs(1, UNEVEN, 1, 2, 8)
    inputs = attention_call(q, k, v, UNEVEN)
    assert "device cpu (only with TRITON_INTERPRET=1)" in TritonBackend().unsupported(inputs)
