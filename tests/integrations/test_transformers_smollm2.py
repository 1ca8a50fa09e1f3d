"""SmolLM2-135M's text, end to end: ours writes what stock SDPA writes."""

import pytest

from benchmarks.studies.generate import STOCK, contestants
from gqa_kernels.reporting.errors import UsageError
from gqa_kernels.samples.smollm2 import load_smollm2

TOKENS = 128
PROMPT = (
    "The sea was calm when the old mapmaker rowed out to the island, and he wrote in his book that "
)


@pytest.mark.slow  # some 640 steps of the model
def test_greedy_text():
    """Even groups, and the same function with uneven ones, with both kinds of cache, in fp32."""
    try:
        loaded = load_smollm2()
    except UsageError as error:
        pytest.skip(str(error))
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    texts = {}
    for name, one in contestants(loaded.model, "auto").items():
        if "int8" not in name:  # rounded keys may write another text
            one.prefill(ids[:, :-1])
            tokens = one.greedy(ids[:, -1:], TOKENS)[0].tolist()
            texts[name] = loaded.tokenizer.decode(tokens)
    assert len(texts) == 5
    assert set(texts.values()) == {texts[STOCK]}
