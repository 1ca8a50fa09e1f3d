"""A small serving engine on this package: continuous batching over a paged cache.

The engine schedules requests and owns the memory. Each step packs the tokens of all running
requests, prompts and single tokens alike, and calls attention once per layer. A random one-layer
model keeps the example short: its tokens mean nothing, but they must not depend on the batching.

    python examples/your_own_engine.py
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gqa_kernels import HeadMap, OutOfPages, PageAllocator, PagedKVCache, asym_gqa_decode

VOCABULARY, HEAD_DIM, PAGE_SIZE = 64, 32, 8


class Model:
    """Embedding, one attention layer with an uneven map, and logits."""

    def __init__(self, head_map: HeadMap):
        generator = torch.Generator().manual_seed(0)
        self.head_map = head_map
        heads = (head_map.num_heads, head_map.num_kv_heads, head_map.num_kv_heads)
        self.embedding = torch.randn(VOCABULARY, 96, generator=generator)
        self.projections = [torch.randn(96, n * HEAD_DIM, generator=generator) / 10 for n in heads]
        self.output = torch.randn(heads[0] * HEAD_DIM, VOCABULARY, generator=generator)

    def qkv(self, tokens: Tensor) -> list[Tensor]:
        """``[total, heads, D]`` each."""
        x = self.embedding[tokens]
        return [(x @ w).unflatten(-1, (-1, HEAD_DIM)) for w in self.projections]


@dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    sequence: int = -1  # of the allocator
    output: list[int] = field(default_factory=list)

    @property
    def next_tokens(self) -> list[int]:
        return self.output[-1:] or self.prompt


class Engine:
    """Runs requests as they fit.

    Args:
        num_pages: pages of the cache. Requests wait if there are too few.
    """

    def __init__(self, model: Model, num_pages: int):
        self.model = model
        self.pool = PagedKVCache.empty(
            num_pages, PAGE_SIZE, model.head_map.num_kv_heads, HEAD_DIM, dtype=torch.float32
        )
        self.allocator = PageAllocator(num_pages, PAGE_SIZE)
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def run(self, requests: list[Request]) -> int:
        """Serve the requests. Returns the number of steps."""
        self.waiting += requests
        steps = 0
        while self.waiting or self.running:
            self._admit()
            self._step()
            steps += 1
        return steps

    def _admit(self) -> None:
        """Start requests whose prompt and output fit beside those that are running."""
        free = self.allocator.num_free_pages - sum(self._pages_left(r) for r in self.running)
        while self.waiting and self._pages(self.waiting[0]) <= free:
            request = self.waiting.pop(0)
            free -= self._pages(request)
            request.sequence = self.allocator.allocate()
            self.running.append(request)
        if not self.running:
            raise OutOfPages(f"a request needs {self._pages(self.waiting[0])} pages, {free} exist")

    def _step(self) -> None:
        counts = [len(request.next_tokens) for request in self.running]
        tokens = torch.tensor([t for request in self.running for t in request.next_tokens])
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        batch = self.allocator.append([r.sequence for r in self.running], counts)
        cache = self.pool.at(batch)
        q, k, v = self.model.qkv(tokens)
        out = asym_gqa_decode(
            q, cache, self.model.head_map, k_new=k, v_new=v, cu_seqlens_q=offsets,
            max_seqlen_q=max(counts), batch_invariant=True,
        )  # fmt: skip
        last = out[offsets[1:].long() - 1].flatten(1)  # each request's last token
        for request, logits in zip(self.running, last @ self.model.output, strict=True):
            request.output.append(int(logits.argmax()))
        for request in [r for r in self.running if len(r.output) == r.max_new_tokens]:
            self.allocator.free(request.sequence)
            self.running.remove(request)

    def _pages(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.max_new_tokens) // PAGE_SIZE)

    def _pages_left(self, request: Request) -> int:
        return self._pages(request) - len(self.allocator.pages(request.sequence))


def main() -> None:
    model = Model(HeadMap([0, 1, 0, 2, 0, 0]))
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 21, 2, 13)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in sizes]
    alone = []
    for prompt in prompts:
        request = Request(prompt, 8)
        Engine(model, num_pages=8).run([request])
        alone.append(request.output)
    together = [Request(prompt, 8) for prompt in prompts]
    steps = Engine(model, num_pages=8).run(together)
    assert [request.output for request in together] == alone, "batching changed the tokens"
    print(f"{len(prompts)} requests in {steps} steps; the tokens are those of each request alone")


if __name__ == "__main__":
    main()
