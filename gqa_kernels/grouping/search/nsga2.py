"""QCQA's two evolutionary searches (arXiv 2406.10247) by NSGA-II; needs pymoo.

Stage 1 groups the heads of a layer, with the number of groups and the objective as two aims.
Stage 2 chooses the layers to convert. (The public code's error counts heads outside the group and
weights them by the group's index; the objective here is the error as the paper defines it.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .descent import objectives
from .partitions import repair
from .problem import Problem
from .registry import Found


def solve(problem: Problem, generations: int = 10, population: int = 100) -> Found:
    """Stage 1: the best partition into ``num_groups`` groups of the final population.

    The genome is the group of each head. Under a size rule (QCQA-EC) every child is repaired;
    with free sizes (QCQA-AC) only the final population is, if it has too few groups.
    """
    D, G, H = problem.distances, problem.num_groups, problem.num_heads
    if generations < 1 or population < 2:
        raise ValueError(
            f"generations must be >= 1 and population >= 2, got {generations} and {population}"
        )

    def aims(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used = (np.sort(genomes)[:, 1:] != np.sort(genomes)[:, :-1]).sum(1) + 1
        return used / H, objectives(D, genomes)

    def repaired(genomes: np.ndarray) -> np.ndarray:
        return np.stack([repair(problem, genome) for genome in genomes.astype(np.intp)])

    genomes = _evolve(
        aims,
        H,
        G - 1,
        generations,
        population,
        problem.seed,
        repaired=repaired if problem.sizes != "free" else None,
        in_time=lambda: problem.time_left() > 0,
    )
    genomes = repaired(genomes)
    return Found(genomes[objectives(D, genomes).argmin()])


def convert_layers(
    num_heads: int,
    num_groups: Sequence[int],
    errors: Sequence[float],
    generations: int = 100,
    population: int = 100,
    seed: int = 0,
) -> list[tuple[int, float, tuple[bool, ...]]]:
    """Stage 2: which of ``L`` layers to convert and which to leave with all their KV heads.

    Args:
        num_heads: KV heads of an unconverted layer.
        num_groups: ``[L]`` KV heads of each layer once converted.
        errors: ``[L]`` objective of each layer once converted.

    Returns:
        The non-dominated choices found, by KV heads: total KV heads, total error, converted layers.
    """
    errors = np.asarray(errors, dtype=np.float64)
    saved = num_heads - np.asarray(num_groups)
    L = len(errors)
    if len(saved) != L:
        raise ValueError(f"num_groups must have {L} entries (as errors), got {len(saved)}")

    def aims(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        genomes = genomes.astype(bool)
        return num_heads * L - genomes @ saved, genomes @ errors

    genomes = np.unique(_evolve(aims, L, 1, generations, population, seed, binary=True), axis=0)
    front: list[tuple[int, float, tuple[bool, ...]]] = []
    heads, totals = aims(genomes)
    for i in np.lexsort((totals, heads)):
        if not front or totals[i] < front[-1][1]:
            front.append((int(heads[i]), float(totals[i]), tuple(genomes[i].astype(bool).tolist())))
    return front


def _evolve(
    aims: Callable,
    length: int,
    largest: int,
    generations: int,
    population: int,
    seed: int,
    binary: bool = False,
    repaired: Callable | None = None,
    in_time: Callable[[], bool] = lambda: True,
) -> np.ndarray:
    """The final population ``[P, length]`` of genomes with entries in ``[0, largest]``."""
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem as PymooProblem
        from pymoo.core.repair import Repair
        from pymoo.operators.crossover.pntx import TwoPointCrossover
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.bitflip import BitflipMutation
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.operators.sampling.rnd import BinaryRandomSampling, IntegerRandomSampling
    except ImportError as error:
        raise ImportError('method "nsga2" must have pymoo (pip install pymoo), got none') from error

    class Aims(PymooProblem):
        def _evaluate(self, x, out, *args, **kwargs):
            out["F"] = np.column_stack(aims(x.astype(np.intp)))

    class RoundAndRepair(Repair):
        def _do(self, problem, x, **kwargs):
            x = np.clip(np.around(x), 0, largest).astype(int)
            return x if repaired is None else repaired(x)

    if binary:
        operators = {
            "sampling": BinaryRandomSampling(),
            "crossover": TwoPointCrossover(),
            "mutation": BitflipMutation(),
        }
    else:
        operators = {
            "sampling": IntegerRandomSampling(),
            "crossover": SBX(prob=0.9, vtype=float, repair=RoundingRepair()),
            "mutation": PM(prob_var=1 / length, vtype=float, repair=RoundingRepair()),
            "repair": RoundAndRepair(),
        }
    algorithm = NSGA2(pop_size=population, eliminate_duplicates=True, **operators)
    algorithm.setup(
        Aims(n_var=length, n_obj=2, xl=0, xu=largest, vtype=bool if binary else int),
        termination=("n_gen", generations),
        seed=seed,
    )
    while algorithm.has_next():
        algorithm.next()
        if not in_time():
            break
    return algorithm.pop.get("X").astype(np.intp)
