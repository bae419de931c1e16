"""When GapMonitor measures: every so many windows, within its budget, on a clock that the test turns."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
import torch

from rlvr_fast.monitor import GapMonitor
from rlvr_fast.monitor.schedule import Schedule

REWARDS = torch.tensor([1.0, 0.0])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train(windows: int, *, step_seconds: float, cost: float, compute_cost: float = 0.0, every: int = 1,
          budget: float | None = 0.03) -> tuple[list[int], float]:
    """(the windows that were measured, the share of the time that it took) of a run with these costs."""
    clock = Clock()
    schedule = Schedule(every, budget, clock)
    measured, spent = [], 0.0
    for window in range(windows):
        clock.now += step_seconds / 2
        if schedule.due:
            measured.append(window)
            with schedule.timed():
                clock.now += cost
            with schedule.timed():
                schedule.plan(*schedule.costs())
                clock.now += compute_cost
            spent += cost + compute_cost
        clock.now += step_seconds / 2
        schedule.end_window()
    return measured, spent / clock.now


def test_without_a_budget_every_window_is_measured():
    assert train(5, step_seconds=1.0, cost=10.0, budget=None)[0] == [0, 1, 2, 3, 4]


def test_every():
    assert train(10, step_seconds=1.0, cost=0.0, every=4)[0] == [0, 4, 8]


def test_cheap_work_is_done_every_time():
    assert train(6, step_seconds=1.0, cost=0.02)[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("budget", [0.03, 0.2])
@pytest.mark.parametrize("cost", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_share_of_the_time_stays_inside_the_budget(cost, budget, share):
    """Three windows are measured before anything is known; the pause after them pays for all three."""
    measured, _ = train(2000, step_seconds=1.0, cost=cost * (1 - share), compute_cost=cost * share, budget=budget)
    assert len(measured) > 4
    assert measured[:3] == [0, 1, 2]
    known = (3 - share) * cost  # what a window costs after it was planned is the next one's to pay
    assert known / measured[3] <= budget * (1 + 1e-9)
    assert measured[3] == 3 or known / (measured[3] - 1) > budget
    intervals = [later - earlier for earlier, later in pairwise(measured[3:])]
    assert all(cost / interval <= budget * (1 + 1e-9) for interval in intervals)
    # and it does not wait longer than it must
    assert all(cost / max(interval - 1, 1) > budget for interval in intervals if interval > 1)


def test_asking_twice_in_a_window_plans_the_same():
    clock = Clock()
    schedule = Schedule(1, 0.1, clock)
    for _ in range(3):
        with schedule.timed():
            clock.now += 1.0
        clock.now += 1.0
        schedule.plan(*schedule.costs())
        first = schedule.next_due
        schedule.plan(*schedule.costs())
        assert schedule.next_due == first
        schedule.end_window()
    assert schedule.next_due == 30  # 3 s out of 30 windows of 1 s


def test_nested_blocks_count_once():
    clock = Clock()
    schedule = Schedule(1, None, clock)
    with schedule.timed():
        clock.now += 1.0
        with schedule.timed():
            clock.now += 2.0
    assert schedule.costs()[0] == 3.0


def test_a_block_that_raises_is_counted_and_closed():
    clock = Clock()
    schedule = Schedule(1, None, clock)
    with contextlib.suppress(KeyError), schedule.timed():
        clock.now += 1.0
        raise KeyError
    with schedule.timed():
        clock.now += 1.0
    assert schedule.costs()[0] == 2.0


# -- the monitor ------------------------------------------------------------------------------------------------------


def test_a_window_that_is_not_measured_costs_nothing_and_reports_nothing():
    monitor = GapMonitor(every=3, budget=None)
    reported = []
    for _ in range(7):
        monitor.update(rewards=REWARDS, prompt_ids=[0, 0])
        assert bool(monitor._increments) == monitor.due
        reported.append(bool(monitor.compute()))
        monitor.reset()
    assert reported == [True, False, False, True, False, False, True]


def on_clock(**options) -> tuple[GapMonitor, Clock]:
    """A monitor whose own work takes no time on the clock that comes with it."""
    clock = Clock()
    monitor = GapMonitor(**options)
    monitor._schedule = Schedule(1, options["budget"], clock)
    return monitor, clock


def test_overhead_is_reported_and_the_callers_own_work_counts():
    monitor, clock = on_clock(budget=None)
    for window in range(3):
        with monitor.timed():
            clock.now += 0.02
        clock.now += 0.06
        monitor.update(rewards=REWARDS, prompt_ids=[0, 0])
        found = monitor.compute()
        monitor.reset()
        assert found["rlvr/time/overhead_ms"] == pytest.approx(20)
        assert found["rlvr/time/windows"] == 1
        assert ("rlvr/time/overhead_share" in found) == (window == 2)  # a whole window has been seen
    assert found["rlvr/time/overhead_share"] == pytest.approx(0.25)


def test_an_expensive_monitor_spaces_itself_out():
    monitor, clock = on_clock(budget=0.125)
    measured = []
    for window in range(100):
        clock.now += 1.0
        if monitor.due:
            measured.append(window)
            with monitor.timed():
                clock.now += 2.0
        monitor.update(rewards=REWARDS, prompt_ids=[0, 0])
        monitor.compute()
        monitor.reset()
    assert measured[0] == 0
    assert measured == [0, 1, 2, 48, 64, 80, 96]  # 2 s in 16 are an eighth; the first three are paid back


def test_the_schedule_survives_a_checkpoint():
    monitor, resumed = GapMonitor(every=4, budget=None), GapMonitor(every=4, budget=None)
    monitor.update(rewards=REWARDS, prompt_ids=[0, 0])
    monitor.compute()
    monitor.reset()
    resumed.load_state_dict(monitor.state_dict())
    due = []
    for _ in range(5):
        due.append(resumed.due)
        resumed.compute()
        resumed.reset()
    assert due == [False, False, False, True, False]
