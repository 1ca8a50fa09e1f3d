"""The simulation of decode batches: its model, and the rule that the GPU kernels have."""

import random
import shutil
import subprocess

import pytest

from benchmarks.studies import decode_balance as study
from gqa_kernels.backends.triton.splits import blocks_per_part, choose_parts
from gqa_kernels.native import sources


def test_the_model():
    one = study.BLOCK * study.KEY_BYTES
    assert study.seconds([10], 4) == pytest.approx(study.START + 10 * one / study.OF_A_BLOCK)
    assert study.seconds([10, 10], 1) == pytest.approx(2 * study.seconds([10], 1))
    full = study.seconds([10] * 396, 396)  # so many share the memory's bandwidth
    assert full == pytest.approx(study.START + 3960 * one / study.BANDWIDTH)


@pytest.mark.parametrize("slots", study.SLOTS.values(), ids=study.SLOTS)
@pytest.mark.parametrize("batch", study.batches(), ids=lambda batch: batch.name)
def test_parts_by_lengths_are_nearly_balanced(batch, slots):
    best = study.seconds(study.balanced(batch, slots), slots)
    assert study.seconds(study.by_lengths(batch, slots), slots) <= 1.1 * best


@pytest.mark.parametrize("slots", study.SLOTS.values(), ids=study.SLOTS)
def test_every_block_is_in_one_part(slots):
    for batch in study.batches():
        blocks = sum(batch.blocks) * batch.tiles
        for way in (study.one_split_count, study.by_lengths):
            assert sum(way(batch, slots)) == blocks


@pytest.mark.parametrize("slots", study.SLOTS.values(), ids=study.SLOTS)
def test_uneven_groups_take_as_long_as_even_ones(slots):
    uneven = next(b for b in study.batches() if b.groups == study.UNEVEN)
    even = uneven._replace(groups=(4,) * 8)
    times = [study.seconds(study.by_lengths(b, slots), slots) for b in (uneven, even)]
    assert times[0] == pytest.approx(times[1], rel=0.03)


def test_the_kernels_have_the_same_rule(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    header = sources.source_root() / "cuda" / "sm80" / "decode" / "part_rule.h"
    generator = random.Random(0)
    cases = [
        (generator.randint(1, 60), generator.randint(1, 500), generator.randint(0, 5000),
         generator.randint(0, 300))
        for _ in range(300)
    ]  # fmt: skip
    calls = "\n".join(
        f"print(even_parts({tiles}, {slots}), {total}, {blocks});"
        for tiles, slots, total, blocks in cases
    )
    program = f"""#include "{header}"
    #include <cstdio>
    using namespace gqa::cuda::sm80;
    static void print(int64_t parts, int64_t total, int64_t blocks) {{
      const int64_t most = blocks_per_part(total, parts);
      std::printf("%d %d %d\\n", int(parts), int(most), int(parts_of(blocks, most)));
    }}
    int main() {{ {calls} }}"""
    (tmp_path / "rule.cpp").write_text(program)
    subprocess.run(
        [compiler, "-std=c++17", tmp_path / "rule.cpp", "-o", tmp_path / "rule"], check=True
    )
    told = subprocess.run([tmp_path / "rule"], capture_output=True, text=True, check=True)
    for line, (tiles, slots, total, blocks) in zip(told.stdout.splitlines(), cases, strict=True):
        parts = choose_parts(1, tiles, 0, slots).even_parts
        most = blocks_per_part(total, parts)
        assert line == f"{parts} {most} {max(1, study.ceil_div(blocks, most))}"
