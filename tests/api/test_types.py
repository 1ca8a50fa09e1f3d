"""Types of the public functions, as type checkers see them."""

import inspect
from pathlib import Path

import pytest

import gqa_kernels
from gqa_kernels.call import keywords
from gqa_kernels.cascade import shared_prefix_attention
from gqa_kernels.decode import DecodePlan

ROOT = Path(gqa_kernels.__file__).resolve().parent.parent

# Each public function with return_lse, its overloads' keywords, and how a snippet calls it.
FUNCTIONS = [
    (gqa_kernels.asym_gqa_attention, keywords.AttentionKeywords, "(x, x, x, [0], causal=True"),
    (
        gqa_kernels.asym_gqa_varlen_attention, keywords.PackedKeywords,
        "(x, x, x, [0], x, x, 1, 1, causal=True",
    ),
    (gqa_kernels.asym_gqa_decode, keywords.DecodeKeywords, "(x, cache, [0], k_new=x, v_new=x"),
    (shared_prefix_attention, keywords.PartKeywords, "(x, cache, cache, [0], softcap=1.0"),
    (DecodePlan.__call__, keywords.StepKeywords, "(plan, x, cache, x, x, rotary_cos=x"),
]  # fmt: skip


@pytest.mark.parametrize("function, typed, _", FUNCTIONS)
def test_overloads_have_the_keywords_of_the_function(function, typed, _):
    parameters = inspect.signature(function).parameters.values()
    keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {
        "return_lse",
        "return_aux",
    }
    if function is shared_prefix_attention:
        keyword_only.remove("layout")  # the overloads have it beside their keywords
    assert keyword_only == set(typed.__annotations__)


def test_return_lse_decides_the_type_of_the_result(tmp_path):
    api = pytest.importorskip("mypy.api")
    lines = [
        "import torch",
        "from gqa_kernels import DenseKVCache, plan_decode, asym_gqa_attention",
        "from gqa_kernels import asym_gqa_decode, asym_gqa_varlen_attention",
        "from gqa_kernels.cascade import shared_prefix_attention",
        "from gqa_kernels.decode import DecodePlan",
        "def run(x: torch.Tensor, cache: DenseKVCache, plan: DecodePlan, flag: bool) -> None:",
    ]
    for function, _, arguments in FUNCTIONS:
        for lse in ("", ", return_lse=False", ", return_lse=True", ", return_lse=flag"):
            lines.append(f"    reveal_type({function.__qualname__}{arguments}{lse}))")
    lines.append("    asym_gqa_attention(x, x, x, [0], return_lse=True, no_such_option=1)")
    program = tmp_path / "calls.py"
    program.write_text("\n".join(lines))
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nmypy_path = {ROOT}\nfollow_imports = silent\n")
    found, errors, _ = api.run([f"--config-file={config}", str(program)])
    assert not errors
    shown = [line.partition('Revealed type is "')[2] for line in found.splitlines()]
    shown = [line.rstrip('"') for line in shown if line]
    one, two = "torch._tensor.Tensor", "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"
    assert shown == [one, one, two, f"{one} | {two}"] * len(FUNCTIONS), found
    wrong = [line for line in found.splitlines() if ": error:" in line]
    assert "no_such_option" in wrong[0]
    assert all(f":{len(lines)}: " in line for line in wrong), found  # the last line's only
