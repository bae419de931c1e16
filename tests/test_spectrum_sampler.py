"""The sampler: its shares, what it repeats and what it does not, resumption, ranks, and inside a DataLoader."""

import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from rlvr_fast.spectrum.mixture import Mixture
from rlvr_fast.spectrum.sampler import SpectrumSampler

BINS = {"easy": range(10), "middle": range(10, 50), "hard": range(50, 80)}


def level(index: int) -> str:
    return next(label for label, indices in BINS.items() if index in indices)


def test_every_batch_holds_the_mixture_to_within_one_prompt():
    weights = {"easy": 0.13, "middle": 0.5, "hard": 0.37}
    sampler = SpectrumSampler(BINS, batch_size=16, n_batches=50, mixture=weights, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 800
    total = Counter(map(level, drawn))
    for start in range(0, 800, 16):
        counts = Counter(map(level, drawn[start:start + 16]))
        assert all(abs(counts[label] - 16 * weight) < 1 for label, weight in weights.items())
    assert all(abs(total[label] / 800 - weight) < 0.02 for label, weight in weights.items())


def test_the_order_within_a_batch_is_random():
    sampler = SpectrumSampler(BINS, batch_size=6, n_batches=200)
    first = Counter(level(batch[0]) for batch in torch.tensor(list(sampler)).view(200, 6).tolist())
    assert all(40 < first[label] < 95 for label in BINS)  # 66.7 expected, standard deviation 6.7


def test_a_bin_is_used_up_before_it_repeats():
    sampler = SpectrumSampler(BINS, batch_size=5, n_batches=12, mixture={"easy": 0, "middle": 1, "hard": 0})
    drawn = list(sampler)
    assert sorted(drawn[:40]) == list(range(10, 50))
    assert len(set(drawn[40:])) == 20
    assert drawn[:20] != drawn[40:]


def test_a_prompt_is_in_a_batch_twice_only_if_the_bin_is_too_small():
    sampler = SpectrumSampler({"a": range(7), "b": range(7, 9)}, batch_size=10, n_batches=60,
                              mixture={"a": 0.6, "b": 0.4})
    for batch in torch.tensor(list(sampler)).view(60, 10).tolist():
        assert sum(index < 7 for index in batch) == len({index for index in batch if index < 7}) == 6
        assert Counter(index for index in batch if index >= 7) == {7: 2, 8: 2}


def test_each_prompt_comes_group_size_times_in_a_row():
    plain, grouped = (SpectrumSampler(BINS, batch_size=4, n_batches=5, group_size=size, seed=1) for size in (1, 3))
    assert list(grouped) == [index for index in plain for _ in range(3)]
    assert len(grouped) == 60


def test_the_seed_fixes_the_order_and_epochs_differ():
    first, again, other = (SpectrumSampler(BINS, batch_size=8, n_batches=4, seed=seed) for seed in (5, 5, 6))
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(again) for _ in range(3)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(other)


def test_new_weights_hold_from_the_next_batch_on():
    sampler = SpectrumSampler(BINS, batch_size=8, n_batches=4)
    indices = iter(sampler)
    before = [level(next(indices)) for _ in range(10)]
    sampler.update({"easy": 0.0, "middle": 0.0, "hard": 5.0})
    assert sampler.mixture == {"easy": 0.0, "middle": 0.0, "hard": 1.0}
    assert set(before) == set(BINS)
    rest = [level(index) for index in indices]
    assert len(set(rest[:6])) > 1  # of the batch that was drawn already
    assert set(rest[6:]) == {"hard"}


def test_a_mixture_may_name_the_bins_in_another_order():
    sampler = SpectrumSampler(BINS, batch_size=8, n_batches=1)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    sampler.update(Mixture(("hard", "easy", "middle"), shares, shares))
    assert sampler.mixture == {"easy": 0.25, "middle": 0.25, "hard": 0.5}
    assert list(sampler.mixture) == list(BINS)


@pytest.mark.parametrize("taken", [0, 1, 12, 13, 35, 36])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(taken):
    """In the middle of a group, of a batch, between batches, at the end; through JSON, as a checkpoint may go."""
    def make():
        return SpectrumSampler(BINS, batch_size=4, n_batches=3, group_size=3, seed=2)
    sampler, resumed = make(), make()
    list(sampler)
    sampler.update({"easy": 1, "middle": 2, "hard": 1})
    indices = iter(sampler)
    for _ in range(taken):
        next(indices)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = [*indices, *sampler]
    resumed.load_state_dict(state)
    assert resumed.mixture == sampler.mixture
    assert len(rest) == 72 - taken
    assert [*resumed, *resumed][:len(rest)] == rest


def test_a_loop_that_was_left_early_starts_a_new_epoch():
    sampler = SpectrumSampler(BINS, batch_size=4, n_batches=3)
    for _ in sampler:
        break
    assert len(list(sampler)) == 12


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch_out(world_size):
    options = {"batch_size": 8, "n_batches": 6, "group_size": 2, "seed": 4}
    alone = torch.tensor(list(SpectrumSampler(BINS, **options))).view(6, 8, 2)
    shards = [torch.tensor(list(SpectrumSampler(BINS, **options, rank=rank, world_size=world_size))).view(6, -1, 2)
              for rank in range(world_size)]
    assert torch.equal(torch.cat(shards, 1), alone)
    for batch in range(6):
        owned = [set(shard[batch].flatten().tolist()) for shard in shards]
        assert sum(map(len, owned)) == len(set().union(*owned)) == 8
    assert len(SpectrumSampler(BINS, **options, rank=0, world_size=world_size)) == 96 // world_size


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(workers):
    sampler = SpectrumSampler(BINS, batch_size=4, n_batches=3, group_size=2, seed=1)
    wanted = torch.tensor(list(SpectrumSampler(BINS, batch_size=4, n_batches=3, group_size=2, seed=1))).view(3, 8)
    loader = DataLoader(range(80), sampler=sampler, batch_size=8, num_workers=workers)
    assert len(loader) == 3
    assert torch.equal(torch.stack(list(loader)), wanted)


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ({"bins": [1, 2]}, TypeError, "bins must be a mapping"),
    ({"bins": {}}, ValueError, "bins must hold at least one bin"),
    ({"bins": {"a": []}}, ValueError, r"bins\['a'\] must hold at least one index"),
    ({"bins": {"a": 3}}, TypeError, r"bins\['a'\] must be a sequence"),
    ({"bins": {"a": [1.5]}}, TypeError, r"an index of bins\['a'\] must be an int"),
    ({"bins": {"a": [1, 1]}}, ValueError, "occur once in all bins together"),
    ({"bins": {"a": [1], "b": [1]}}, ValueError, r"bins\['b'\] must hold indices that occur once"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"batch_size": 4, "world_size": 3}, ValueError, "batch_size must be a multiple of world_size = 3"),
    ({"rank": 1}, ValueError, "rank must be below world_size = 1"),
    ({"n_batches": 1.0}, TypeError, "n_batches must be an int"),
    ({"group_size": 0}, ValueError, "group_size must be at least 1"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"mixture": [1, 1, 1]}, TypeError, "mixture must be a Mixture or a mapping"),
    ({"mixture": {"easy": 1}}, ValueError, "mixture must have exactly the bins"),
    ({"mixture": {"easy": 1, "middle": -1, "hard": 1}}, ValueError, "mixture must be at least 0 everywhere"),
    ({"mixture": {"easy": 0, "middle": 0, "hard": 0}}, ValueError, "mixture must be at least 0 everywhere"),
])
def test_bad_arguments_are_named(arguments, kind, message):
    arguments = {"bins": BINS, "batch_size": 4, "n_batches": 2} | arguments
    with pytest.raises(kind, match=message):
        SpectrumSampler(arguments.pop("bins"), **arguments)


def test_a_state_of_another_sampler_is_refused():
    sampler = SpectrumSampler(BINS, batch_size=4, n_batches=2)
    with pytest.raises(ValueError, match="same bins, batch_size"):
        sampler.load_state_dict(SpectrumSampler(BINS, batch_size=8, n_batches=2).state_dict())
    with pytest.raises(ValueError, match="state must be what state_dict returned"):
        sampler.load_state_dict({"generator": 3})


def test_it_prints_in_a_line():
    assert repr(SpectrumSampler({"a": [0, 1], "b": [2]}, batch_size=2, n_batches=3)) == (
        "SpectrumSampler(2 prompts × 1, 3 batches, rank 0 of 1; a: 50.0% of 2, b: 50.0% of 1)")
