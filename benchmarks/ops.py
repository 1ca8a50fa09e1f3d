"""What can be measured, as data: how to build a case's problem, check results, and who competes.

Only ops that the package has are listed. To add one, give it cases (a key, work for the roofline or
None), a problem made from a case, a gate over results, and contestants; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .contestants import Contestant, backends
from .peers import peers
from .problem import Gate, Problem


@dataclass(frozen=True)
class Op:
    """One kind of measurement.

    Attributes:
        summary: one line for ``--list``.
        build: problem of a case on a device.
        gate: from a problem, an object whose ``check(result)`` raises AssertionError if wrong.
        backends, peers: contestants by name.
    """

    summary: str
    build: Callable[..., Any]
    gate: Callable[[Any], Any]
    backends: Callable[[], dict[str, Contestant]]
    peers: Callable[[], dict[str, Contestant]]


OPS: dict[str, Op] = {
    "decode": Op("one new query token per sequence", Problem.build, Gate, backends, peers),
    "prefill": Op("all tokens of a prompt at once", Problem.build, Gate, backends, peers),
}
