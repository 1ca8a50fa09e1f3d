"""What can be measured, as data: how to build a case's problem, check results, and who competes.

Only ops that the package has are listed. To add one, give it cases (a key, work for the roofline or
None), a problem made from a case, a gate over results, and contestants; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..measure.roofline import Work
from ..peers import cache_peers, peers
from ..peers.base import Contestant, backends
from .attention import Gate, Problem
from .backward import (
    BackwardGate,
    BackwardProblem,
    backward_backends,
    backward_peers,
    backward_work,
)
from .caches import (
    AppendGate,
    CacheGate,
    CacheProblem,
    append_backends,
    append_peers,
    cache_backends,
)
from .decoder import Decoder, DecoderGate, decoder_backends, decoder_peers
from .search import SearchGate, SearchProblem, search_backends, search_peers


@dataclass(frozen=True)
class Op:
    """One kind of measurement.

    Attributes:
        summary: one line for ``--list``.
        build: problem of a case on a device.
        gate: from a problem, an object whose ``check(result)`` raises AssertionError if wrong.
        work: bytes and operations of a case, or None where no roofline bounds it.
        backends, peers: contestants by name.
    """

    summary: str
    build: Callable[..., Any]
    gate: Callable[[Any], Any]
    work: Callable[[Any], Work] | None
    backends: Callable[[], dict[str, Contestant]]
    peers: Callable[[], dict[str, Contestant]]


def _attention(summary: str) -> Op:
    return Op(summary, Problem.build, Gate, lambda case: case.work, backends, peers)


def _over_cache(summary: str, gate: Callable, backends: Callable, peers: Callable[[], dict]) -> Op:
    return Op(summary, CacheProblem.build, gate, lambda case: case.work, backends, peers)


def _end_to_end(summary: str) -> Op:
    return Op(summary, Decoder.build, DecoderGate, None, decoder_backends, decoder_peers)


OPS: dict[str, Op] = {
    "decode": _attention("attention of one new token per sequence"),
    "prefill": _attention("attention of all tokens of a prompt at once"),
    "backward": Op(
        "gradients of q, k and v in training",
        BackwardProblem.build,
        BackwardGate,
        backward_work,
        backward_backends,
        backward_peers,
    ),
    "decode-cache": _over_cache("decode over a KV cache", CacheGate, cache_backends, cache_peers),
    "append": _over_cache(
        "append of one new token to a KV cache", AppendGate, append_backends, append_peers
    ),
    "first-token": _end_to_end("a whole decoder's time to the first token after a prompt"),
    "generate": _end_to_end("a whole decoder's further tokens, with the prompt in the cache"),
    "search": Op(
        "partition of a layer's heads: time, and how good the partition is",
        SearchProblem.build,
        SearchGate,
        None,
        search_backends,
        search_peers,
    ),
}
ALIASES = {"e2e": ("first-token", "generate")}  # names for several ops
