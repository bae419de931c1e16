"""What measure_step warns of, how it prints and logs, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy
from step_batches import NAN, measure_log_ratios, one_token_rollouts, ragged_batch

from rlvr_fast.step.measure import measure_step


def big_batch(step=0.05, shift=0.0):
    policy, generator = SignPolicy(16, 4, 0.3), torch.Generator().manual_seed(5)
    rollouts = policy.sample(64, 8, generator)
    logps = [policy.moved(multiple * step * policy.break_even).logp_of(rollouts) for multiple in (0, 1, -1)]
    return logps[0] - shift, logps[1], rollouts, logps[2]


def test_a_sound_measurement_has_no_warnings():
    before, after, rollouts, _ = big_batch(step=0.5)
    assert measure_step(before, after, rollouts, in_sample=False).warnings == ()


@pytest.mark.parametrize(("in_sample", "phrase"), [
    (True, "in-sample: these rollouts"), (None, "in_sample was not stated"),
])
def test_in_sample_measurements_say_so(in_sample, phrase):
    before, after, rollouts, _ = big_batch()
    measure = measure_step(before, after, rollouts, in_sample=in_sample)
    assert measure.in_sample is in_sample
    assert [phrase in warning for warning in measure.warnings] == [True]


def test_a_mismatched_sampler_is_noticed():
    before, after, rollouts, _ = big_batch(shift=0.02)
    measure = measure_step(before, after, rollouts, in_sample=False)
    assert measure.mean_ratio.item() == pytest.approx(math.exp(16 * 0.02), rel=0.05)
    assert any("mean ratio" in warning for warning in measure.warnings)


def test_a_handful_of_failures_is_noticed():
    policy = SignPolicy(16, 10, 0.12)
    rollouts = policy.sample(64, 8, torch.Generator().manual_seed(0))
    assert 0 < (~rollouts.correct).sum() < 30
    found = measure_step(policy.logp_of(rollouts), policy.moved(0.02).logp_of(rollouts), rollouts, in_sample=False)
    assert any("scarcer class has only" in warning for warning in found.warnings)


def test_a_step_out_of_reach_is_noticed():
    before, after, rollouts, _ = big_batch(step=1.3)
    warnings = " ".join(measure_step(before, after, rollouts, in_sample=False).warnings)
    assert "effective sample size gone" in warnings


@pytest.mark.parametrize(("bend", "phrase"), [
    (-0.5, None), (-0.02, "within two standard errors of zero"), (0.5, "does not curve down"),
])
def test_a_curvature_that_says_nothing_is_noticed(bend, phrase):
    """20 prompts of 4 + 4, second derivative ``bend`` on the correct ones with noise 0.1."""
    correct, generator = torch.tensor([True, False] * 80), torch.Generator().manual_seed(1)
    rollouts = one_token_rollouts(correct, torch.arange(160) // 8)
    h = bend * correct + 0.1 * torch.randn(160, generator=generator, dtype=torch.float64)
    measure = measure_log_ratios(h / 2, rollouts, backward=h / 2, in_sample=False)
    assert [w for w in measure.warnings if "curv" in w and phrase and phrase in w] == \
        [w for w in measure.warnings if "curv" in w]
    assert any("curv" in w for w in measure.warnings) == (phrase is not None)


def test_summary_is_flat_and_safe_for_loggers_that_reduce_by_name():
    before, after, rollouts, reverse = big_batch()
    measure = measure_step(before, after, rollouts, logp_reverse=reverse, in_sample=False)
    summary = measure.summary()
    assert all(isinstance(value, float) for value in summary.values())
    assert all(name.startswith("rlvr/step/") and "min" not in name and "max" not in name for name in summary)
    assert summary["rlvr/step/success_gain"] == measure.success_gain.item()
    assert summary["rlvr/step/frac_defined"] == measure.defined.double().mean().item()
    assert summary["rlvr/step/log_odds_gain"] == pytest.approx(measure.log_odds_gain[measure.defined].mean().item())


def test_repr_is_a_table():
    before, after, rollouts, _ = big_batch()
    text = repr(measure_step(before, after, rollouts))
    assert text.startswith("StepMeasure(64 prompts")
    assert "success_gain" in text
    assert "! in_sample was not stated" in text


# -- bad input --------------------------------------------------------------------------------------------------------


def with_entry(x, value):
    x = x.clone()
    x[3] = value
    return x


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda a: {"logp_before": a["logp_before"][:-1]}, ValueError, "logp_before must start with"),
    (lambda a: {"logp_after": a["logp_after"][:, None]}, ValueError, "logp_after must have 1 dimension"),
    (lambda a: {"logp_after": a["logp_after"].tolist()}, TypeError, "logp_after must be a torch.Tensor"),
    (lambda a: {"logp_before": a["logp_before"].long()}, TypeError, "logp_before must have dtype"),
    (lambda a: {"logp_after": a["logp_after"].to("meta")}, ValueError, "logp_after must be on cpu"),
    (lambda a: {"logp_after": with_entry(a["logp_after"], NAN)}, ValueError, "logp_after must be log-probabilities"),
    (lambda a: {"logp_before": with_entry(a["logp_before"], -math.inf)}, ValueError, "logp_before must be log-prob"),
    (lambda a: {"logp_reverse": with_entry(a["logp_after"], NAN)}, ValueError, "logp_reverse must be log-prob"),
    (lambda a: {"logp_reverse": a["logp_after"][:2]}, ValueError, "logp_reverse must start with"),
    (lambda a: {"logp_after": -a["logp_after"]}, ValueError, "never above 0"),
    (lambda a: {"rollouts": None}, TypeError, "rollouts must be Rollouts"),
    (lambda a: {"in_sample": "yes"}, TypeError, "in_sample must be True, False or None"),
    (lambda a: {"backend": "fast"}, ValueError, "backend must be one of"),
], ids=range(13))
def test_refuses(change, error, message):
    rollouts, before, after, _ = ragged_batch(0)
    arguments = {"logp_before": before, "logp_after": after, "rollouts": rollouts}
    arguments |= change(arguments)
    with pytest.raises(error, match=message):
        measure_step(**arguments)
