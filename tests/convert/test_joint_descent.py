"""descend_together(): both maps, with a loss that is more than the sum of the sides'."""

from itertools import product

import numpy as np
import pytest

from gqa_kernels.convert.joint_descent import descend_together
from gqa_kernels.grouping.objective import group_cost, objective
from tests.grouping.brute_force import partitions


class Side:
    def __init__(self, seed, all_known=True):
        points = np.random.default_rng(seed).normal(size=(6, 4))
        self.pairs = ((points[:, None] - points) ** 2).sum(-1)
        self.all_known = all_known

    def limits(self, num_groups):
        return 1, 6

    def cost(self, heads):
        return group_cost(self.pairs, heads)


SIDES = {"k": Side(0), "v": Side(1)}
THREE = [p for p in partitions(6) if max(p) == 2]


def apart(labels):
    return sum(objective(SIDES[name].pairs, each) for name, each in labels.items())


def together(labels):
    """Pairs that only one side keeps together cost extra."""
    same = [np.equal.outer(each, each) for each in labels.values()]
    return apart(labels) + 0.5 * (same[0] != same[1]).sum()


def least(joint):
    return min(joint({"k": a, "v": b}) for a, b in product(THREE, THREE))


@pytest.mark.parametrize("all_known", [True, False])
def test_a_lower_loss_is_found(all_known):
    sides = {"k": Side(0, all_known), "v": Side(1, all_known)}
    start = {name: min(THREE, key=lambda p, n=name: apart({n: p})) for name in sides}
    labels, value = descend_together(sides, start, together)
    assert value == together(labels) and value < together(start)
    assert value <= 1.1 * least(together)
    assert all(max(each) == 2 for each in labels.values())


def test_losses_that_add_up_leave_the_maps_alone():
    start = {"k": THREE[5], "v": THREE[40]}
    calls = []
    labels, value = descend_together(SIDES, start, lambda each: calls.append(1) or apart(each))
    assert labels == start and value == apart(start) and len(calls) == 1
