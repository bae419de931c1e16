"""How the windows of a GapMonitor add, blend, merge and persist."""

from __future__ import annotations

import io
import math

import pytest
import torch
from monitor_ranks import GROUP_SIZE, IDS, REWARDS, Step, monitor, once, without_time

EXACT = 1e-12  # float64 sums in another order
FLOAT32 = 1e-6  # the head pass and response gradients are float32


@pytest.fixture(scope="module")
def step() -> Step:
    return Step.sample(0)


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_micro_batches_gives_the_metrics_of_one_batch(step, seed):
    whole, split = monitor(group_size=GROUP_SIZE), monitor(group_size=GROUP_SIZE)
    step.feed(whole)
    order = torch.randperm(len(step.ids), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, len(order), 5):  # not a divisor: fragments of groups, and a short last one
        step.rows(order[start:start + 5]).feed(split)
    expected = without_time(whole.compute())
    assert without_time(split.compute()) == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)


def test_compute_may_be_repeated_and_takes_in_what_came_since():
    own = monitor(decay=0.5)
    own.update(rewards=REWARDS[:8], prompt_ids=IDS[:8])
    first = own.compute()
    assert without_time(own.compute()) == without_time(first)
    own.update(rewards=REWARDS[8:], prompt_ids=IDS[8:])
    assert own.compute()["rlvr/group/frac_mixed"] == 0.5


def test_reset_forgets_the_window():
    own = monitor()
    own.update(rewards=REWARDS[:4], prompt_ids=IDS[:4])
    own.compute()
    own.reset()
    assert without_time(own.compute()) == {}
    assert once(of=own, rewards=REWARDS[8:], prompt_ids=IDS[8:])["rlvr/group/frac_mixed"] == 1.0


def test_running_means_keep_numerators_and_denominators_apart():
    """A window of one prompt with κ = a and one of three with κ = b: weighted by prompts, not by windows."""
    own = monitor(decay=0.5)
    own.update(rewards=REWARDS[8:12], prompt_ids=IDS[8:12])  # one prompt, p = 1/4
    assert own.compute()["rlvr/group/p_mean/ema"] == 0.25
    own.reset()
    own.update(rewards=REWARDS[:12], prompt_ids=IDS[:12])  # three: 1, 0, 1/4
    found = own.compute()
    assert found["rlvr/group/p_mean/ema"] == pytest.approx((0.5 * 0.25 + 1.25) / (0.5 * 1 + 3), rel=EXACT)
    assert found["rlvr/group/p_mean"] == pytest.approx(1.25 / 3, rel=EXACT)


def test_errors_of_running_means_add_as_variances(step):
    own, other = monitor(decay=0.5), Step.sample(5)
    errors = []
    for each in (step, other):
        each.feed(own)
        found = own.compute()
        own.reset()
        count = 4 * round(found["rlvr/group/frac_mixed"] * len(each.ids) / 4) / 4
        errors.append((found["rlvr/gap/norm_sq_stderr"] * count, count))
    (first, n_first), (second, n_second) = errors
    expected = math.hypot(0.5 * first, second) / (0.5 * n_first + n_second)
    assert found["rlvr/gap/norm_sq_stderr/ema"] == pytest.approx(expected, rel=EXACT)


def test_a_window_that_was_not_computed_leaves_no_trace_in_the_running_means():
    own = monitor(decay=0.5)
    own.update(rewards=REWARDS[:4], prompt_ids=IDS[:4])
    own.reset()
    assert once(of=own, rewards=REWARDS[4:8], prompt_ids=IDS[4:8])["rlvr/group/p_mean/ema"] == 0.0


# -- state ------------------------------------------------------------------------------------------------------------


def test_state_survives_a_file_in_the_middle_of_a_window(step):
    own, resumed = (monitor(decay=0.7, group_size=GROUP_SIZE) for _ in range(2))
    Step.sample(7).feed(own)
    own.compute()
    own.reset()
    step.rows(list(range(9))).feed(own)
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (own, resumed):
        step.rows(list(range(9, len(step.ids)))).feed(each)
    assert without_time(resumed.compute()) == without_time(own.compute())
    for each in (own, resumed):
        each.reset()
        each.update(rewards=REWARDS, prompt_ids=IDS)
    assert without_time(resumed.compute()) == without_time(own.compute())


def test_merge_is_feeding_one_monitor(step):
    whole, first, second = (monitor(decay=0.7, group_size=GROUP_SIZE) for _ in range(3))
    before = Step.sample(8)
    before.feed(whole)
    before.rows(list(range(4, len(before.ids)))).feed(first)  # running sums of other groups, some of them fragments
    before.rows(list(range(4))).feed(second)
    for each in (whole, first, second):
        each.compute()
        each.reset()
    step.feed(whole)
    step.rows(list(range(10))).feed(first)
    step.rows(list(range(10, len(step.ids)))).feed(second)
    first.merge(second)
    merged, expected = without_time(first.compute()), without_time(whole.compute())
    window = [key for key in expected if not key.endswith("/ema")]
    assert {key: merged[key] for key in window} == pytest.approx({key: expected[key] for key in window}, rel=FLOAT32,
                                                                 abs=FLOAT32)
    # Sums over responses add, whoever was fed which; those over prompts do where no prompt was split.
    by_response = ("rlvr/logp/token/ema", "rlvr/token/score_sq/ema", "rlvr/token/energy_pos/ema", "rlvr/ratio/ess/ema")
    assert {key: merged[key] for key in by_response} == pytest.approx({key: expected[key] for key in by_response},
                                                                      rel=FLOAT32)


def test_repr_is_one_line(step):
    own = monitor()
    step.feed(own)
    assert repr(own) == f"GapMonitor(level=hidden, length_norm=True, window=0 (measured), responses={len(step.ids)})"
