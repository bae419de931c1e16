"""Finite groups and the walks on them, and what the relay's parts refuse."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch

from rlvr_fast.simulate.relay.exact import mixture
from rlvr_fast.simulate.relay.group import Group, cyclic, named, symmetric
from rlvr_fast.simulate.relay.task import StateTracking
from rlvr_fast.simulate.relay.training import Recipe, train


@pytest.mark.parametrize(("name", "order", "abelian"), [
    ("Z_7", 7, True), ("Z_96", 96, True), ("S_3", 6, False), ("S_4", 24, False), ("S_5", 120, False), ("A_3", 3, True),
    ("A_4", 12, False), ("A_5", 60, False)])
def test_groups_have_their_order_and_inverses(name, order, abelian):
    group = named(name)
    elements = torch.arange(order)
    assert (group.order, group.abelian) == (order, abelian)
    assert (group.table[elements, group.inverse] == group.identity).all()
    assert (group.table[group.inverse, elements] == group.identity).all()
    for line in (group.table, group.table.T):  # every row and column holds every element
        assert (line.sort(1).values == elements).all()
    assert name in repr(group)


def test_permutations_compose_from_the_right():
    points = list(permutations(range(3)))
    group = symmetric(3)
    swap, turn = points.index((1, 0, 2)), points.index((1, 2, 0))
    assert points[int(group.table[swap, turn])] == (0, 2, 1)  # turn first: 0 → 1 → 0, 1 → 2 → 2, 2 → 0 → 1
    assert points[int(group.table[turn, swap])] == (2, 1, 0)


@pytest.mark.parametrize(("table", "said"), [
    ([[0, 1], [1, 2]], "closure"), ([[1, 1], [1, 1]], "identity"), ([[0, 1], [1, 1]], "inverse"),
    ([[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]], "associative"),
    ([[0, 1, 2]], r"\[d, d\]"), ([[0]], "at least 2")])
def test_tables_that_are_no_groups_are_refused(table, said):
    with pytest.raises(ValueError, match=said):
        Group(torch.tensor(table))


@pytest.mark.parametrize("name", ["Z_5", "S_3"])
def test_walk_is_the_sum_over_all_paths(name):
    group, generator = named(name), torch.Generator().manual_seed(0)
    kernels = torch.rand(2, 3, group.order, generator=generator, dtype=torch.float64).softmax(-1)
    expected = torch.zeros(2, group.order, dtype=torch.float64)
    for actions in product(range(group.order), repeat=3):
        end = group.path(torch.tensor([group.identity]), torch.tensor([actions]))[0, -1]
        expected[:, end] += math.prod(kernels[:, k, action] for k, action in enumerate(actions))
    torch.testing.assert_close(group.walk(kernels), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: mixture(StateTracking(cyclic(96)), 5, 0.9, 45), "ratio must be above 1"),
    (lambda: mixture(StateTracking(cyclic(96)), 0, 3, 45), "length must be 1 to 48"),
    (lambda: StateTracking(cyclic(96)).prompts(49, 1, torch.Generator()), "length must be 1 to 48"),
    (lambda: StateTracking(cyclic(5), 8).prompts(6, 1, torch.Generator()), "length must be 1 to 5"),
    (lambda: StateTracking(cyclic(5), 1), "n_identifiers"), (lambda: StateTracking(cyclic(5), c_b=-1.0), "c_b"),
    (lambda: train(StateTracking(cyclic(5), 4), (3, 2), Recipe(), 1, seed=0, measure_every=1), "increase"),
    (lambda: train(StateTracking(cyclic(5), 4), (), Recipe(), 1, seed=0, measure_every=1), "at least one"),
    (lambda: train(StateTracking(cyclic(5), 4), (2,), Recipe(), 0, seed=0, measure_every=1), "n_steps"),
    (lambda: train(StateTracking(cyclic(5), 4), (2,), Recipe(), 1, seed=0, measure_every=0), "measure_every"),
    (lambda: train(StateTracking(cyclic(5), 4), (2,), Recipe(), 1, seed=0, measure_every=1, enough=()), "enough"),
    (lambda: Recipe(0.0), "learning_rate"), (lambda: Recipe(batch_size=0), "batch_size"),
    (lambda: Recipe(baseline_decay=1.0), "baseline_decay"), (lambda: Recipe(entropy_weight=-1e-3), "entropy_weight"),
    (lambda: cyclic(1), "n must be 2"), (lambda: symmetric(6), "n must be 2 to 5"), (lambda: named("D_4"), "Z_n, S_n"),
    (lambda: named("Z_x"), "Z_n, S_n")])
def test_bad_values_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("call", [
    lambda: StateTracking([[0, 1], [1, 0]]), lambda: cyclic(5.0), lambda: Group([[0, 1], [1, 0]]),
    lambda: Group(torch.zeros(2, 2)), lambda: StateTracking(cyclic(5)).check_length(2.0),
    lambda: mixture(StateTracking(cyclic(96)), 5, "3", 45)])
def test_bad_types_are_named(call):
    with pytest.raises(TypeError, match="must"):
        call()
