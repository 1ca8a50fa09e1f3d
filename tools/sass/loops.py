"""Loops of a kernel, and the shortest way around a loop that meets all of its matrix products.

A loop's static size counts code that one iteration does not execute, such as masking on the
diagonal. The hot path is what a warp executes for a tile that needs no mask: the shortest path from
the loop's head back to it through every block that holds a matrix instruction, and through the
unrolled asynchronous copies of the next tile.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from typing import NamedTuple

from .disassemble import Instruction, Kernel

PRODUCT = re.compile(r"^(HGMMA|HMMA|IMMA|QGMMA|UTCHMMA)")
COPY = "LDGSTS"
UNROLLED_COPIES = 4  # a block with as many copies is unrolled; one with fewer is a loop's body
JUMPS = ("BRA", "CALL")
ENDS_BLOCK = {*JUMPS, "EXIT", "BRX", "RET"}
LABEL_OPERAND = re.compile(r"`\((\.L\S+?)\)")

# In order: an instruction belongs to the first class whose expression matches its opcode.
CLASSES = {
    "matrix": PRODUCT,
    "ex2": re.compile(r"^MUFU\.EX2"),
    "other MUFU": re.compile(r"^MUFU"),
    "FMUL": re.compile(r"^FMUL"),
    "FFMA": re.compile(r"^FFMA"),
    "FADD": re.compile(r"^FADD"),
    "FMNMX": re.compile(r"^FMNMX"),
    "F2FP": re.compile(r"^F2FP"),
    "LDSM": re.compile(r"^LDSM"),
    "LDS": re.compile(r"^LDS"),
    "STS": re.compile(r"^STS"),
    "cp.async": re.compile(r"^LDGSTS"),
    "TMA": re.compile(r"^UTMA"),
    "LDG": re.compile(r"^LDG"),
    "STG": re.compile(r"^STG"),
    "shuffle": re.compile(r"^SHFL"),
    "barrier": re.compile(r"^(BAR|B2R|SYNCS)"),
    "compare": re.compile(r"^(FSETP|FSEL)"),
    "branch": re.compile(r"^(BRA|EXIT|BRX|CALL|RET|NANOSLEEP)"),
    "warp sync": re.compile(r"^(WARPSYNC|WARPGROUP|BSSY|BSYNC|ELECT|VOTE|DEPBAR|LDGDEPBAR|FENCE)"),
    "integer and moves": re.compile(r"."),
}


class Loop(NamedTuple):
    """A loop with matrix products.

    ``size`` counts every instruction of its blocks, ``path`` are those of the hot path.
    """

    kernel: str
    address: int
    size: int
    path: list[Instruction]

    @property
    def counts(self) -> Counter[str]:
        """Instructions of the hot path by class."""
        return Counter(
            next(name for name, pattern in CLASSES.items() if pattern.match(i.opcode))
            for i in self.path
        )


class Walk(NamedTuple):
    """A way around a loop: its instructions, and those of inner loops among them."""

    instructions: list[Instruction]
    inner: int


class Graph(NamedTuple):
    """Basic blocks as half-open ranges of instructions, and the successors of each."""

    blocks: list[tuple[int, int]]
    successors: list[list[int]]


def control_flow(kernel: Kernel) -> Graph:
    """The kernel's basic blocks and the edges between them."""
    instructions = kernel.instructions
    starts = {0} | set(kernel.labels.values())
    starts |= {i + 1 for i, x in enumerate(instructions) if x.operation in ENDS_BLOCK}
    bounds = [*sorted(s for s in starts if s < len(instructions)), len(instructions)]
    blocks = list(itertools.pairwise(bounds))
    index = {begin: number for number, (begin, _) in enumerate(blocks)}
    successors = []
    for _, end in blocks:
        targets = _targets(instructions[end - 1], end, kernel.labels)
        successors.append([index[t] for t in targets if t in index])
    return Graph(blocks, successors)


def _targets(last: Instruction, end: int, labels: dict[str, int]) -> list[int]:
    """Where a block continues, given its last instruction."""
    conditional = last.text.startswith("@")
    if last.operation in JUMPS:
        match = LABEL_OPERAND.search(last.text)
        targets = [labels[match[1]]] if match and match[1] in labels else []
        if last.operation == "CALL":  # of a label inside the kernel: a jump; else it comes back
            return [end, *targets] if conditional or not targets else targets
        # .DIV and .CONV: the warp diverged, or not. The detour that this takes is on no hot path.
        if ".DIV" in last.opcode or ".CONV" in last.opcode:
            return [end, *targets]
        has_predicate = re.search(r"BRA(\.\w+)*\s+!?U?P", last.text) is not None
        return [*targets, end] if conditional or has_predicate or ".U" in last.opcode else targets
    if last.operation == "BRX" and (listed := re.search(r"BRANCH_TARGETS ([\w.,]+)", last.text)):
        return [labels[name] for name in listed[1].split(",") if name in labels]
    if last.operation in ("EXIT", "RET"):
        return [end] if conditional else []
    return [end]


def natural_loops(graph: Graph) -> dict[int, set[int]]:
    """Blocks of each loop, by the loop's head (the target of a back edge that dominates it)."""
    # Indirect jumps hide edges. A virtual entry leads to every block that nothing seems to reach.
    targets = {successor for successors in graph.successors for successor in successors}
    entries = [block for block in range(len(graph.blocks)) if block == 0 or block not in targets]
    successors = [*graph.successors, entries]
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominator = _immediate_dominators(order, predecessors)
    loops: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if not _dominates(head, block, dominator):
                continue
            body, pending = {head, block}, [block]
            while pending:
                current = pending.pop()
                if current == head:
                    continue
                new = [p for p in predecessors[current] if p not in body]
                body.update(new)
                pending += new
            loops.setdefault(head, set()).update(body)
    return loops


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    """What the last block reaches, each block before its successors unless they form a cycle."""
    entry = len(successors) - 1
    finished, seen = [], {entry}
    stack = [(entry, iter(successors[entry]))]
    while stack:
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return finished[::-1]


def _immediate_dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """The closest dominator of each block.

    Source: Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm".
    """
    position = {block: number for number, block in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if position[new] > position[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
            if dominator.get(block) != new:
                dominator[block], changed = new, True
    return dominator


def _dominates(head: int, block: int, dominator: dict[int, int]) -> bool:
    while block != head and dominator[block] != block:
        block = dominator[block]
    return block == head


def main_loops(kernel: Kernel, min_products: int = 8) -> list[Loop]:
    """Innermost loops with at least ``min_products`` matrix instructions, in address order."""
    graph = control_flow(kernel)
    code = [kernel.instructions[begin:end] for begin, end in graph.blocks]
    products = [sum(PRODUCT.match(i.opcode) is not None for i in block) for block in code]
    copies = [sum(i.operation == COPY for i in block) for block in code]
    loops = natural_loops(graph)
    heavy = {h: body for h, body in loops.items() if sum(products[b] for b in body) >= min_products}
    found = []
    for head, body in sorted(heavy.items()):
        if any(other != head and heavy[other] < body for other in heavy):
            continue
        path = _hot_path(graph, products, copies, head, body)
        if path is None:
            continue
        size = sum(len(code[b]) for b in body)
        hot = [i for b in path for i in code[b]]
        found.append(Loop(kernel.name, code[head][0].address, size, hot))
    return found


def _hot_path(
    graph: Graph, products: list[int], copies: list[int], head: int, body: set[int]
) -> list[int] | None:
    """The shortest walk from ``head`` back to it through all products and the unrolled copies."""
    through = {b for b in body if products[b] and b != head}
    # Neighbouring blocks of copies are alternatives (the whole row, or a row with a tail).
    alternatives: list[list[int]] = []
    for block in sorted(b for b in body if copies[b] >= UNROLLED_COPIES):
        if alternatives and alternatives[-1][-1] == block - 1:
            alternatives[-1].append(block)
        else:
            alternatives.append([block])
    walks = [
        walk
        for chosen in itertools.product(*alternatives)
        if (walk := _walk(graph, body, head, through | set(chosen))) is not None
    ]
    return min(walks, key=lambda walk: _instructions(graph, walk), default=None)


def _walk(graph: Graph, body: set[int], head: int, through: set[int]) -> list[int] | None:
    """The shortest walk from ``head`` back to it that visits ``through`` in the loop's order."""
    others = sorted(through - {head})
    # Blocks that lie before the head in memory come after the others in the loop's order.
    order = [b for b in others if b > head] + [b for b in others if b < head] + [head]
    walk: list[int] = []
    current = head
    for target in order:
        step = _shortest(graph, body, current, target)
        if step is None:
            return None
        walk += step
        current = target
    return walk


def walk_through(
    kernel: Kernel, address: int, pattern: re.Pattern[str], inner_loops: bool = True
) -> Walk:
    """The way around the loop at ``address`` that meets most instructions whose opcode matches, and
    among those ways the shortest. Inner loops are passed once, or lie on no way."""
    graph = control_flow(kernel)
    loops = natural_loops(graph)
    code = [kernel.instructions[begin:end] for begin, end in graph.blocks]
    head = next(h for h in loops if code[h][0].address == address)
    body = loops[head]
    inside = set().union(*(own for h, own in loops.items() if h != head and own < body))
    if not inner_loops:
        body = body - inside
    backwards = {(b, h) for h, own in loops.items() for b in own if h in graph.successors[b]}
    forward = {
        b: [s for s in graph.successors[b] if s in body and (b, s) not in backwards] for b in body
    }
    best: dict[int, tuple[tuple[int, int], int | None]] = {}
    for block in reversed(_order_from(head, forward)):
        worth = (sum(pattern.match(i.opcode) is not None for i in code[block]), -len(code[block]))
        ways = [(best[s][0], s) for s in forward[block] if s in best]
        if (block, head) in backwards:
            ways.append(((0, 0), -1))
        if ways:
            (matches, size), following = max(ways)
            best[block] = ((matches + worth[0], size + worth[1]), following)
    walk, block = [], head
    while block != -1:
        walk.append(block)
        block = best[block][1]
    inner = sum(len(code[b]) for b in walk if b in inside)
    return Walk([i for b in walk for i in code[b]], inner)


def _order_from(head: int, forward: dict[int, list[int]]) -> list[int]:
    """Blocks in an order in which each comes before those that follow it."""
    virtual = len(forward) + max(forward) + 1
    renamed = {block: number for number, block in enumerate(forward)}
    successors = [[renamed[s] for s in forward[b]] for b in forward] + [[renamed[head]]]
    names = [*forward, virtual]
    return [names[b] for b in _reverse_postorder(successors) if names[b] != virtual]


def _instructions(graph: Graph, walk: list[int]) -> int:
    return sum(end - begin for begin, end in (graph.blocks[b] for b in walk))


def _shortest(graph: Graph, body: set[int], source: int, target: int) -> list[int] | None:
    """Blocks after ``source`` up to ``target`` with the fewest instructions, inside ``body``."""

    def length(block: int) -> int:
        begin, end = graph.blocks[block]
        return end - begin

    queue = [(length(b), b, (b,)) for b in graph.successors[source] if b in body]
    heapq.heapify(queue)
    seen = set()
    while queue:
        cost, block, path = heapq.heappop(queue)
        if block in seen:
            continue
        seen.add(block)
        if block == target:
            return list(path)
        for b in graph.successors[block]:
            if b in body and b not in seen:
                heapq.heappush(queue, (cost + length(b), b, (*path, b)))
    return None
