"""GapMonitor over real ranks (gloo): the metrics of one process, the same on all, by one collective per window."""

from __future__ import annotations

import pytest
from gloo_ranks import Ranks
from monitor_ranks import GROUP_SIZE, WORLDS, figures, windows, without_time, work

from rlvr_fast.monitor import GapMonitor

TOLERANCE = 1e-6  # relative; the head pass runs in float32 over batches of other shapes


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Ranks]:
    """What every scenario gave on every rank; the processes run once."""
    return Ranks.run(work, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.mark.parametrize("count", WORLDS)
def test_groups_split_over_ranks_give_the_metrics_of_one_process(worlds, count):
    """All tiers, three windows with running means: were states reduced, the second window would be off."""
    expected = figures(GapMonitor(group_size=GROUP_SIZE, budget=None), windows())
    answers = [found for found, _ in worlds[count].answers("metrics")]
    assert all(found == answers[0] for found in answers), "ranks differ"
    for own, alone in zip(answers[0], expected, strict=True):
        assert without_time(own) == pytest.approx(without_time(alone), rel=TOLERANCE, abs=TOLERANCE)
        assert len(without_time(own)) > 60


@pytest.mark.parametrize("count", WORLDS)
def test_one_collective_per_window_but_where_a_buffer_must_grow(worlds, count):
    for _, collectives in worlds[count].answers("metrics"):
        assert collectives == 3 + 2  # the first window's rows, and the larger second's; the third fits


@pytest.mark.parametrize("count", WORLDS)
def test_ranks_of_different_speed_measure_the_same_windows(worlds, count):
    measured = worlds[count].answers("schedule")
    assert all(own == measured[0] for own in measured)
    assert measured[0][0]
    assert 1 < sum(measured[0]) < len(measured[0])


@pytest.mark.parametrize(("scenario", "words"), [("differing", "same settings"), ("out of step", "same window"),
                                                 ("not global", "prompt_ids must be global")])
@pytest.mark.parametrize("count", WORLDS)
def test_refused_on_every_rank(worlds, count, scenario, words):
    for answer in worlds[count].answers(scenario):
        assert words in answer
