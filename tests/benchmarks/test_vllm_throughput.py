"""The judge of what contestants wrote. The engines themselves: `tests/engine`."""

import torch

from benchmarks.studies.vllm_throughput import below_the_best
from tests.tiny_models import tiny


def test_distance_to_the_best_token():
    """0 of greedy texts; of another token, what the logits of a call on its prefix say."""
    model = tiny()
    prompts = [[5, 6, 7], [8, 3, 9]]
    new = 4
    greedy = model.generate(torch.tensor(prompts), do_sample=False, min_new_tokens=new,
                            max_new_tokens=new)[:, 3:].tolist()  # fmt: skip
    assert not below_the_best(model, prompts, greedy).any()
    other = (greedy[1][2] + 1) % model.config.vocab_size
    written = [greedy[0], [*greedy[1][:2], other, greedy[1][3]]]
    found = below_the_best(model, prompts, written)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompts[1], *greedy[1][:2]]])).logits[0, -1]
    torch.testing.assert_close(found[1, 2], logits.max() - logits[other])
    assert not found[0].any() and not found[1, :2].any()
