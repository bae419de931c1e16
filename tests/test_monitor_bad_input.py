"""What GapMonitor refuses, in which words, and that a refused update leaves it as it was."""

from __future__ import annotations

import math
import re

import pytest
import torch
from monitor_ranks import GROUP_SIZE, Step

import rlvr_fast as rf
from rlvr_fast.monitor import GapMonitor

STEP = Step.sample(0)
R, T = STEP.mask.shape
CORRECT = STEP.correct
LOGP = STEP.logp
ONES = torch.ones(R)


def gap(**options) -> rf.Gap:
    return rf.gradient_gap(STEP.hidden, STEP.weight, STEP.rollouts, **options)


def spoiled(x: torch.Tensor, value: float) -> torch.Tensor:
    """With ``value`` on the first response token."""
    x = x.clone()
    x[tuple(STEP.mask.nonzero()[0])] = value
    return x


SHARED = {"correct": CORRECT, "prompt_ids": STEP.prompt_ids, "mask": STEP.mask}
UPDATES = {
    "nothing": ({}, ValueError, "update needs rollouts, rewards, correct or advantages"),
    "no verdicts": ({"mask": STEP.mask, "logp": LOGP}, ValueError, "update needs rollouts, rewards, correct or"),
    "rewards other": ({"rewards": 2 * ONES}, ValueError, "rewards must be 0 or 1, got .* give the monitor a threshold"),
    "rewards infinite": ({"rewards": math.inf * ONES}, ValueError, "rewards must be finite"),
    "rewards list": ({"rewards": [1.0, 0.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
    "rewards complex": ({"rewards": ONES.to(torch.complex64)}, TypeError, "rewards must hold real numbers"),
    "rewards scalar": ({"rewards": torch.tensor(1.0)}, ValueError, "rewards must have one entry per response"),
    "correct other": ({"correct": 2 * ONES}, ValueError, "correct must be 0 or 1"),
    "verdicts twice": ({"rewards": ONES, "correct": CORRECT}, ValueError, "got correct and rewards"),
    "rollouts and rewards": ({"rollouts": STEP.rollouts, "rewards": ONES}, ValueError, "got rollouts and rewards"),
    "rollouts and ids": ({"rollouts": STEP.rollouts, "prompt_ids": STEP.prompt_ids}, ValueError, "prompt_ids must be"),
    "rollouts and mask": ({"rollouts": STEP.rollouts, "mask": STEP.mask}, ValueError, "mask must be left out"),
    "rollouts type": ({"rollouts": 3}, TypeError, "rollouts must be rlvr_fast.Rollouts, got int"),
    "advantages shape": ({"correct": CORRECT, "advantages": ONES[1:]}, ValueError, "advantages must have shape"),
    "advantages NaN": ({"advantages": math.nan * ONES}, ValueError, "advantages must be finite"),
    "stray advantages": ({"advantages": 0.123 * ONES}, ValueError, "advantages must come from groups of 4"),
    "rate": ({"correct": CORRECT, "success_rate": 1.5 * ONES}, ValueError, r"success_rate must be in \[0, 1\]"),
    "ids too few": ({"correct": CORRECT, "prompt_ids": [1]}, ValueError, f"got 1 for {R} responses"),
    "ids string": ({"correct": CORRECT, "prompt_ids": "a" * R}, TypeError, "prompt_ids must be a tensor or a sequence"),
    "ids float": ({"correct": CORRECT, "prompt_ids": ONES}, TypeError, "prompt_ids must have dtype"),
    "ids objects": ({"correct": CORRECT, "prompt_ids": [object()] * R}, TypeError, "prompt_ids must be integers, str"),
    "mask values": ({"correct": CORRECT, "mask": 2 * torch.ones(R, T)}, ValueError, "mask must hold only 0 and 1"),
    "mask shape": ({"correct": CORRECT, "mask": STEP.mask[1:]}, ValueError, rf"mask must have shape \[{R}, \*\]"),
    "logp without mask": ({"correct": CORRECT, "logp": LOGP}, ValueError, "logp needs rollouts or a mask"),
    "logp shape": ({**SHARED, "logp": LOGP[:, 1:]}, ValueError, rf"logp must have shape \[{R}, {T}\]"),
    "logp integers": ({**SHARED, "logp": STEP.ids}, TypeError, "logp must have dtype"),
    "logp NaN": ({**SHARED, "logp": spoiled(LOGP, math.nan)}, ValueError, "logp must be finite on the resp"),
    "old_logp alone": ({**SHARED, "old_logp": LOGP}, ValueError, "old_logp needs logp"),
    "old_logp infinite": ({**SHARED, "logp": LOGP, "old_logp": spoiled(LOGP, -math.inf)}, ValueError, "old_logp must"),
    "sum_p_sq alone": ({**SHARED, "sum_p_sq": STEP.sum_p_sq}, ValueError, "sum_p_sq needs logp"),
    "sum_p_sq range": ({**SHARED, "logp": LOGP, "sum_p_sq": spoiled(STEP.sum_p_sq, 1.5)}, ValueError,
                       r"sum_p_sq must be in \(0, 1\]"),
    "logp positive": ({**SHARED, "logp": spoiled(LOGP, 0.5), "sum_p_sq": STEP.sum_p_sq}, ValueError,
                      "logp must be at most 0"),
    "entropy alone": ({**SHARED, "entropy": STEP.entropy}, ValueError, "entropy needs logp"),
    "stats type": ({**SHARED, "stats": 1}, TypeError, "stats must be rlvr_fast.TokenStats, got int"),
    "stats and logp": ({"rollouts": STEP.rollouts, "logp": LOGP, "stats": gap().stats}, ValueError, "give stats, or"),
    "hidden alone": ({"rollouts": STEP.rollouts, "hidden": STEP.hidden}, ValueError, "hidden and weight must be given"),
    "hidden without rollouts": ({**SHARED, "hidden": STEP.hidden, "weight": STEP.weight}, ValueError, "hidden needs"),
    "hidden and gap": ({"rollouts": STEP.rollouts, "hidden": STEP.hidden, "weight": STEP.weight, "gap": gap()},
                       ValueError, "give hidden and weight, or gap"),
    "hidden shape": ({"rollouts": STEP.rollouts, "hidden": STEP.hidden[1:], "weight": STEP.weight}, ValueError,
                     "hidden must start with"),
    "gap type": ({"gap": 1}, TypeError, "gap must be a Gap or a ModelGapResult, got int"),
    "gap level": ({"gap": gap(level="logits")}, ValueError, "gap must have the monitor's level 'hidden'"),
    "gap length_norm": ({"gap": gap(length_norm=False)}, ValueError, "and length_norm True, got 'hidden' and False"),
    "gap of others": ({"gap": gap(), "rollouts": STEP.rows([0, 1]).rollouts}, ValueError, "gap must be of the 2 resp"),
    "gap with advantages of others": ({"gap": gap(), "advantages": ONES[1:]}, ValueError, "advantages must have shape"),
    "gap with stray tokens": ({"gap": gap(), "logp": LOGP}, ValueError, "logp needs rollouts or a mask"),
    "step alone": ({"step": object()}, ValueError, "step and learning_rate must be given together"),
    "step type": ({"step": 1, "learning_rate": 1.0}, TypeError, "step must be a StepMeasure, got int"),
}


@pytest.mark.parametrize(("data", "error", "words"), UPDATES.values(), ids=UPDATES)
def test_a_refused_update_names_the_argument_and_changes_nothing(data, error, words):
    monitor, untouched = (GapMonitor(budget=None, group_size=GROUP_SIZE) for _ in range(2))
    half = STEP.rows(list(range(R // 2)))
    for each in (monitor, untouched):
        half.feed(each)
    with pytest.raises(error, match=words):
        monitor.update(**data)
    figures = [{k: v for k, v in each.compute().items() if "/time/" not in k} for each in (monitor, untouched)]
    assert figures[0] == figures[1]


def test_vectors_of_another_width_are_refused():
    monitor = GapMonitor(budget=None)
    STEP.feed(monitor)
    other = Step.sample(1, width=3)
    with pytest.raises(ValueError, match=r"gap must have vectors of 5 coordinates, .*, got 3"):
        other.feed(monitor)


def test_sign_of_an_advantage_is_no_verdict_without_the_groups_own_baseline():
    monitor = GapMonitor(estimator="reinforce_pp")
    with pytest.raises(ValueError, match="rewards or correct must be given beside advantages of estimator"):
        monitor.update(advantages=ONES)


CONSTRUCTIONS = {
    "level": ({"level": "layer"}, ValueError, "level must be one of"),
    "length_norm": ({"length_norm": 1}, TypeError, "length_norm must be a bool"),
    "threshold": ({"threshold": math.nan}, ValueError, "threshold must be finite"),
    "group_size": ({"group_size": 1}, ValueError, "group_size must be an int >= 2"),
    "estimator": ({"estimator": "ppo"}, ValueError, "estimator must be one of"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be positive"),
    "decay": ({"decay": 1.0}, ValueError, r"decay must be in \(0, 1\)"),
    "every": ({"every": 0}, ValueError, "every must be >= 1"),
    "every type": ({"every": 1.0}, TypeError, "every must be an int"),
    "budget": ({"budget": 1.5}, ValueError, "budget must be a share"),
    "group": ({"group": 1}, TypeError, "group must be a torch.distributed.ProcessGroup"),
}


@pytest.mark.parametrize(("options", "error", "words"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_refused_settings(options, error, words):
    with pytest.raises(error, match=words):
        GapMonitor(**options)


def test_ids_that_are_not_global_are_refused_when_the_group_size_is_known():
    monitor = GapMonitor(budget=None, group_size=2)
    for _ in range(2):  # two micro-batches that both count their prompts from 0
        monitor.update(rf.Rollouts.from_padded(torch.ones(2, 1, dtype=torch.int64), None, torch.tensor([1.0, 0]),
                                               group_size=2))
    with pytest.raises(ValueError, match=r"prompt_ids must be global: one prompt has 4 responses .* group_size = 2"):
        monitor.compute()


def test_a_window_with_and_without_ids_is_refused():
    monitor = GapMonitor(budget=None)
    monitor.update(rewards=ONES)
    monitor.update(rewards=ONES, prompt_ids=STEP.prompt_ids)
    with pytest.raises(ValueError, match="prompt_ids must be given in every update of a window or in none"):
        monitor.compute()


@pytest.mark.parametrize(("column", "value", "words"), [
    ("logp", math.nan, "logp must be finite, got NaN or infinity on the device"),
    ("log_ratio", math.inf, "old_logp must be finite"), ("correct", 0.5, "must be 0 or 1")])
def test_what_a_device_hid_from_update_is_refused_in_compute(column, value, words):
    """Device tensors are not looked at in ``update``; their rows are, later."""
    from rlvr_fast.monitor.inputs import COLUMNS

    monitor = GapMonitor(budget=None)
    monitor.update(**SHARED, logp=LOGP, old_logp=LOGP)
    monitor._increments[0].responses.cells[0, 1 + COLUMNS.index(column)] = value
    with pytest.raises(ValueError, match=re.escape(words)):
        monitor.compute()


@pytest.mark.parametrize("state", [None, {}, {"settings": {}, "running": {}, "rows": {}}])
def test_a_malformed_state_is_refused(state):
    with pytest.raises(ValueError, match="state must be a dict with settings, running, rows, schedule"):
        GapMonitor().load_state_dict(state)


def test_a_state_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="state must come from a monitor with the settings"):
        GapMonitor().load_state_dict(GapMonitor(level="logits").state_dict())


def test_merging_what_is_no_equal_monitor_is_refused():
    with pytest.raises(TypeError, match="other must be a GapMonitor, got dict"):
        GapMonitor().merge({})
    with pytest.raises(ValueError, match="other must have this monitor's settings"):
        GapMonitor().merge(GapMonitor(decay=0.5))
