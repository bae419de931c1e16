"""StepMeter: ends of steps against exact derivatives, peak and break-even against the truth, and its bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy

from rlvr_fast import Rollouts
from rlvr_fast import reference_step as reference
from rlvr_fast.simulate.coverage import problem_of
from rlvr_fast.simulate.problems import Bandit, sample
from rlvr_fast.step.directional_scores import DirectionalScores, directional_scores
from rlvr_fast.step.fit import curvature_row, fit_step, mean_slope_row, slope_row
from rlvr_fast.step.meter import StepMeter


def end_of_step(fraction=0.8, regime="middle", seed=0, n_prompts=64, group_size=8):
    """Rollouts of where a step of ``fraction`` break-evens led, and their scores along it."""
    task, theta, update = problem_of(regime)
    after = theta + fraction * update
    batch = sample(task, after, n_prompts, group_size, torch.Generator().manual_seed(seed))
    scores = directional_scores(lambda: task.logp(after, batch), [after], [fraction * update], batch.rollouts)
    return batch.rollouts, scores


def start_of_step(fraction=0.8, regime="middle", seed=100):
    task, theta, update = problem_of(regime)
    at = theta.clone()
    batch = sample(task, at, 64, 8, torch.Generator().manual_seed(seed))
    return batch.rollouts, directional_scores(lambda: task.logp(at, batch), [at], [fraction * update], batch.rollouts)


def read(*ends, start=None, **options):
    meter = StepMeter(**options)
    if start is not None:
        meter.start(*start, held_out=True)
    for rollouts, scores in ends:
        meter.end(rollouts, scores)
    return meter.reading()


# -- directional scores -----------------------------------------------------------------------------------------------


def test_scores_are_the_derivatives_of_the_log_probability():
    """Against autograd on a softmax policy, where they are not trivial; the error is that of the difference, w²."""
    bandit = Bandit.random(8, 5, 6, torch.Generator().manual_seed(0))
    theta, update = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = sample(bandit, theta, 16, 4, torch.Generator().manual_seed(2))
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    v = torch.ones(64, dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad(bandit.logp(theta + m * update, batch) @ v, m, create_graph=True)
    s, = torch.autograd.grad(first, v, create_graph=True)
    h, = torch.autograd.grad(torch.autograd.grad(first, m, create_graph=True)[0], v)
    found = directional_scores(lambda: bandit.logp(theta, batch), [theta], [update], batch.rollouts, width=1e-3)
    torch.testing.assert_close(found.slope, s.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.curvature, h, rtol=1e-4, atol=1e-6)
    assert found.behind is None  # only a width of 1 reaches back to the previous policy
    assert found.token_slope.item() == pytest.approx(s.abs().max().item(), rel=1e-4)
    whole = directional_scores(lambda: bandit.logp(theta, batch), [theta], [update], batch.rollouts)
    torch.testing.assert_close(whole.behind, bandit.logp(theta - update, batch) - bandit.logp(theta, batch))


def test_parameters_come_back_bitwise_and_logp_is_asked_twice():
    task, theta, update = problem_of("middle")
    batch, parameter, calls = sample(task, theta, 4, 4, torch.Generator().manual_seed(0)), theta.clone(), []

    def logp_fn(failing=None):
        calls.append(parameter.item())
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return task.logp(parameter, batch)

    directional_scores(logp_fn, [parameter], [update], batch.rollouts, logp=task.logp(parameter, batch))
    assert calls == pytest.approx([theta.item() + update.item(), theta.item() - update.item()])
    for failing in (1, 2, 3):
        calls.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            directional_scores(lambda f=failing: logp_fn(f), [parameter], [update], batch.rollouts)
        assert torch.equal(parameter, theta)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({}, ValueError, "slope, curvature or behind must be given"),
    ({"slope": torch.zeros(2, 2)}, ValueError, "slope must have 1 dimension"),
    ({"slope": torch.tensor([0.0, math.nan])}, ValueError, "slope must be finite"),
    ({"slope": torch.zeros(2), "behind": torch.zeros(3)}, ValueError, r"behind must have shape \[2\]"),
    ({"slope": torch.zeros(2, dtype=torch.int64)}, TypeError, "slope must have dtype"),
    ({"slope": [0.0]}, TypeError, "slope must be a torch.Tensor"),
])
def test_scores_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        DirectionalScores(**arguments)


# -- the fit ----------------------------------------------------------------------------------------------------------


ROWS = {"start": slope_row(0.0), "end": slope_row(1.0), "bend": curvature_row(1.0), "gain": mean_slope_row(1.0)}


@pytest.mark.parametrize("names", [("start", "end"), ("end", "bend"), ("end", "gain"),
                                   ("start", "end", "bend", "gain")])
def test_a_parabola_is_found_from_any_two_measurements(names):
    """J′ = 2 − 1.6 m: peak at 1.25, break-even at 2.5."""
    values = torch.tensor([ROWS[n][0] * 2 - ROWS[n][1] * 1.6 for n in names], dtype=torch.float64)
    fit = fit_step([ROWS[n] for n in names], values, 1e-8 * torch.eye(len(names), dtype=torch.float64), 0.0)
    peak, even = fit.peak(1.96), fit.break_even(1.96)
    assert peak.value == pytest.approx(1.25, rel=1e-4)
    assert even.value == pytest.approx(2.5, rel=1e-4)
    assert peak.low < 1.25 < peak.high < 1.26
    assert fit.evaluate(mean_slope_row(1.0))[0] == pytest.approx(1.2, rel=1e-4)


def test_the_interval_is_fieller_s():
    """a, c independent: the ends solve (a + c m)² = z²(σ_a² + σ_c² m²), a quadratic with a closed form."""
    a, c, sa, sc, z = 1.0, -0.5, 0.1, 0.08, 1.96
    fit = fit_step([slope_row(0.0), curvature_row(0.0)], torch.tensor([a, c], dtype=torch.float64),
                   torch.diag(torch.tensor([sa, sc], dtype=torch.float64) ** 2), 0.0)
    quadratic = (c * c - z * z * sc * sc, 2 * a * c, a * a - z * z * sa * sa)
    root = math.sqrt(quadratic[1] ** 2 - 4 * quadratic[0] * quadratic[2])
    low, high = ((-quadratic[1] + sign * root) / (2 * quadratic[0]) for sign in (-1, 1))
    found = fit.peak(z)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, low, high), rel=1e-3)
    loose = fit_step([slope_row(0.0), curvature_row(0.0)], torch.tensor([a, c], dtype=torch.float64),
                     torch.diag(torch.tensor([sa, 0.3], dtype=torch.float64) ** 2), 0.0).peak(z)
    assert loose.high == math.inf  # a slope of the slope that may be 0
    assert loose.value == pytest.approx(2.0, rel=1e-3)


def test_a_departure_from_the_parabola_widens_the_interval_and_not_the_estimate():
    arguments = ([slope_row(0.0), curvature_row(0.0)], torch.tensor([1.0, -0.5], dtype=torch.float64),
                 1e-6 * torch.eye(2, dtype=torch.float64))
    narrow, wide = (fit_step(*arguments, departure).peak(1.96) for departure in (0.0, 0.4))
    assert narrow.value == pytest.approx(wide.value, rel=1e-3)
    assert narrow.high - narrow.low < 0.02 < 0.5 < wide.high - wide.low


def test_what_does_not_fix_a_parabola_gives_none():
    one = torch.ones(1, 1, dtype=torch.float64)
    assert fit_step([slope_row(1.0)], one[0], one, 0.4) is None
    assert fit_step([slope_row(1.0), slope_row(1.0)], torch.ones(2).double(), torch.eye(2).double(), 0.4) is None
    silent = torch.zeros(2, 2, dtype=torch.float64)
    assert fit_step([slope_row(0.0), slope_row(1.0)], torch.ones(2).double(), silent, 0.4) is None


# -- the reading ------------------------------------------------------------------------------------------------------


def test_measurements_are_the_specification_s_means_over_prompts():
    rollouts, scores = end_of_step()
    reading = read((rollouts, scores))
    slopes, bends, groups = [], [], []
    for p in range(rollouts.n_prompts):
        mine = rollouts.prompt_index == p
        correct = rollouts.correct[mine]
        slopes.append(reference.success_slope(scores.slope[mine], correct))
        bends.append(reference.success_curvature(scores.slope[mine], scores.curvature[mine], correct))
        groups.append((scores.behind[mine], correct))
    gains = -reference.controlled_gains(groups)
    for name, values in (("end_slope", torch.stack(slopes)), ("curvature", torch.stack(bends)),
                         ("realised_gain", gains)):
        assert getattr(reading, name) == pytest.approx(values.mean().item(), rel=1e-9)
        assert getattr(reading, f"{name}_stderr") == pytest.approx((values.std() / 8).item(), rel=1e-9)
    assert reading.success == pytest.approx(rollouts.rewards.double().mean().item())
    assert reading.kl == pytest.approx(scores.slope.square().mean().item() / 2)
    assert (reading.n_prompts, reading.n_responses) == (64, 512)
    assert sum(row.n_prompts for row in reading.bins) == 64
    assert reading.prompts.alignment.shape == (64,)


@pytest.mark.parametrize("regime", ["hard", "middle", "easy"])
@pytest.mark.parametrize(("fraction", "allowed"), [(0.3, {"safe", "near"}), (0.8, {"near", "undetermined"}),
                                                   (1.2, {"overshoot", "undetermined"})])
def test_break_even_and_verdict_at_64_prompts_of_8(regime, fraction, allowed):
    """Ten draws: the median break-even within 15 % of the truth, no false verdict, the interval almost always right."""
    readings = [read(end_of_step(fraction, regime, seed)) for seed in range(10)]
    even = torch.tensor([r.break_even for r in readings]) * fraction
    assert even.median().item() == pytest.approx(1, abs=0.15)
    held = sum(r.break_even_low * fraction <= 1 <= r.break_even_high * fraction for r in readings)
    assert held >= 8
    assert {r.verdict for r in readings} <= allowed


def test_a_held_out_start_and_smoothing_narrow_the_interval():
    ends = [end_of_step(0.8, "easy", seed) for seed in range(5)]
    plain, smoothed = read(ends[-1]), read(*ends, smoothing=0.9)
    with_start = read(ends[-1], start=start_of_step(0.8, "easy"))
    width = [r.peak_high - r.peak_low for r in (plain, with_start, smoothed)]
    assert width[2] < 0.7 * width[0]
    assert width[1] < width[0]
    assert with_start.start_slope > 0
    assert math.isnan(plain.start_slope)


def test_smoothing_keeps_numerators_and_denominators_apart():
    """Two batches, the second of twice the prompts: weights 0.5·32 and 64, not 0.5 and 1."""
    first, second = end_of_step(seed=1, n_prompts=32), end_of_step(seed=2, n_prompts=64)
    slopes = [read(batch).end_slope for batch in (first, second)]
    both = read(first, second, smoothing=0.5)
    assert both.end_slope == pytest.approx((16 * slopes[0] + 64 * slopes[1]) / 80)
    assert both.n_prompts == 80
    errors = [read(batch).end_slope_stderr for batch in (first, second)]
    assert both.end_slope_stderr == pytest.approx(math.hypot(16 * errors[0], 64 * errors[1]) / 80)


def test_without_smoothing_only_the_last_step_counts():
    last = end_of_step(0.8, seed=3)
    found = read(end_of_step(1.2, seed=1), last, start=start_of_step())
    assert found.summary() == pytest.approx(read(last).summary(), nan_ok=True)


def test_figures_scale_with_the_unit():
    """The same step as length 1 and as a learning rate; read in steps, in learning rates, and for twice the rate."""
    rollouts, scores = end_of_step()
    by_step, by_rate = StepMeter(), StepMeter()
    by_step.end(rollouts, scores)
    by_rate.end(rollouts, scores, length=1e-6)
    one, other, twice = by_step.reading(), by_rate.reading(), by_rate.reading(length=2e-6)
    for name in ("peak", "break_even", "gain", "realised_gain", "end_slope", "curvature", "kl", "theorem_bound",
                 "token_bound"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), name
    assert twice.peak == pytest.approx(one.peak / 2, rel=2e-2)  # the assumed departure is in units of the step
    assert twice.end_slope == pytest.approx(2 * one.end_slope)
    assert twice.curvature == pytest.approx(4 * one.curvature)
    assert twice.kl == pytest.approx(4 * one.kl)
    assert twice.theorem_bound == pytest.approx(one.theorem_bound / 2, rel=2e-2)


def test_bounds_are_far_below_the_measured_threshold():
    reading = read(end_of_step(0.3))
    assert 0 < reading.theorem_bound < 0.1 * reading.break_even_low
    assert 0 < reading.token_bound < reading.break_even_low
    assert "constants estimated" in repr(reading)


# -- refusals and reasons ---------------------------------------------------------------------------------------------


def test_in_sample_starts_are_refused_or_labelled():
    start, end = start_of_step(0.3), end_of_step(0.3)
    with pytest.raises(ValueError, match="held_out must be True"):
        StepMeter().start(*start, held_out=False)
    meter = StepMeter(allow_in_sample=True)
    meter.start(*start, held_out=False)
    meter.end(*end)
    reading = meter.reading()
    assert reading.in_sample
    assert (reading.verdict, reading.reason) == ("undetermined", "in-sample")
    assert "IN-SAMPLE" in repr(reading)
    meter.end(*end)
    assert not meter.reading().in_sample  # without smoothing it left with its step


def test_a_scarce_class_leaves_the_slopes_alone():
    """J = 0.98, 64 x 8: about a dozen failures. Curvature and gain are shown or not, never used."""
    end = end_of_step(0.8, "near one")
    alone, both = read(end), read(end, start=start_of_step(0.8, "near one"))
    assert (alone.verdict, alone.reason) == ("undetermined", "scarce class")
    assert math.isnan(alone.peak)
    assert math.isfinite(alone.end_slope)
    assert alone.scarcer < 30
    assert math.isfinite(both.peak)
    assert math.isfinite(read(end, class_floor=0).peak)


def test_a_step_that_no_rollout_remembers_is_overshoot_only_by_its_end_slope():
    gone = read(end_of_step(1.2, "far"))
    assert gone.ess_fraction < 0.1
    assert math.isnan(gone.break_even)
    assert gone.end_slope < -5 * gone.end_slope_stderr
    assert (gone.verdict, gone.reason) == ("overshoot", "sample gone")
    assert math.isnan(gone.realised_gain)
    rollouts, scores = end_of_step(0.3, "middle")
    flat = DirectionalScores(scores.slope * 0, scores.curvature, 40 * scores.behind)
    quiet = read((rollouts, flat))
    assert (quiet.verdict, quiet.reason) == ("undetermined", "sample gone")


def test_a_foreign_sampler_s_gain_is_not_used():
    """Ratios all e times too large: the effective sample looks healthy, the mean ratio does not."""
    rollouts, scores = end_of_step(0.3)
    shifted = read((rollouts, DirectionalScores(scores.slope, scores.curvature, scores.behind + 1)))
    assert shifted.ess_fraction > 0.5
    assert math.isnan(shifted.realised_gain)
    assert shifted.reason == "sample gone"


def test_a_reused_output_buffer_is_no_trap():
    task, theta, update = problem_of("middle")
    batch, parameter = sample(task, theta, 4, 4, torch.Generator().manual_seed(0)), theta.clone()
    buffer = torch.empty(batch.rollouts.n_tokens, dtype=torch.float64)
    plain, reused = (directional_scores(f, [parameter], [update], batch.rollouts) for f in (
        lambda: task.logp(parameter, batch), lambda: buffer.copy_(task.logp(parameter, batch))))
    assert torch.equal(plain.slope, reused.slope)
    assert plain.slope.abs().amax() > 0


@pytest.mark.parametrize(("rewards", "n_prompts", "reason"), [
    ([1.0] * 16, 4, "no contrast"), ([0.0, 1.0] * 8, 1, "few prompts"), ([0.0, 1.0] * 8, 4, "scarce class"),
])
def test_reasons_of_thin_batches(rewards, n_prompts, reason):
    rollouts = Rollouts.from_padded(torch.ones(16, 2, dtype=torch.int64), None, torch.tensor(rewards),
                                    group_size=16 // n_prompts)
    s = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reading = read((rollouts, DirectionalScores(s, -s * s)))
    assert (reading.verdict, reading.reason) == ("undetermined", reason)
    assert isinstance(repr(reading), str)


def test_one_kind_of_measurement_is_not_enough_but_a_gain_has_a_sign():
    rollouts, scores = end_of_step(0.3)
    slope_only, gain_only = (read((rollouts, DirectionalScores(**{name: getattr(scores, name)})))
                             for name in ("slope", "behind"))
    assert (slope_only.verdict, slope_only.reason) == ("undetermined", "one measurement")
    assert math.isnan(slope_only.break_even)
    assert (gain_only.verdict, math.isnan(gain_only.peak)) == ("near", True)
    assert gain_only.realised_gain == read((rollouts, scores)).realised_gain


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda m, r, s: m.reading(), ValueError, "nothing was measured yet"),
    (lambda m, r, s: m.end(None, s), TypeError, "rollouts must be Rollouts"),
    (lambda m, r, s: m.end(r, s.slope), TypeError, "scores must be DirectionalScores"),
    (lambda m, r, s: m.end(r, DirectionalScores(s.slope[:-1])), ValueError, "scores.slope must have shape"),
    (lambda m, r, s: m.end(r, s, length=0), ValueError, "length must be positive"),
    (lambda m, r, s: m.start(r, DirectionalScores(behind=s.behind), held_out=True), ValueError, "must have a slope"),
    (lambda m, r, s: m.start(r, s, held_out=1), TypeError, "held_out must be a bool"),
    (lambda m, r, s: StepMeter(smoothing=1.0), ValueError, "smoothing must be at least 0 and below 1"),
    (lambda m, r, s: StepMeter(margin=0.5), ValueError, "margin must be at least 1"),
    (lambda m, r, s: StepMeter(n_bins=0), ValueError, "n_bins must be an int >= 1"),
    (lambda m, r, s: StepMeter(z=0), ValueError, "z must be positive"),
    (lambda m, r, s: StepMeter(reduce=3), TypeError, "reduce must be callable"),
    (lambda m, r, s: m.load_state_dict({}), ValueError, "state must be"),
    (lambda m, r, s: m.load_state_dict(StepMeter(n_bins=2).state_dict()), ValueError, "n_bins 5"),
], ids=range(14))
def test_refuses(call, error, message):
    rollouts, scores = end_of_step(n_prompts=4)
    with pytest.raises(error, match=message):
        call(StepMeter(), rollouts, scores)


# -- bookkeeping ------------------------------------------------------------------------------------------------------


def test_two_ranks_that_reduce_read_what_one_rank_reads():
    """Each rank has half of the prompts; the reduction is one flat tensor per call. Only β is each rank's own."""
    rollouts, scores = end_of_step(n_prompts=64)

    def part(prompts):
        rows = torch.isin(rollouts.prompt_index, prompts)
        ids = rollouts.prompt_index[rows]
        tokens = rollouts.tokens.view(512, -1)[rows]
        mine = Rollouts.from_padded(tokens, None, rollouts.rewards[rows], prompt_ids=ids)
        return mine, DirectionalScores(scores.slope[rows], scores.curvature[rows])

    halves = [part(torch.arange(32)), part(torch.arange(32, 64))]
    flats, sums = [[], []], None
    for i, half in enumerate(halves):
        StepMeter(reduce=flats[i].append).end(*half)
    assert [len(calls) for calls in flats] == [1, 1]
    assert flats[0][0].ndim == 1
    sums = flats[0][0] + flats[1][0]
    meter = StepMeter(reduce=lambda flat: flat.copy_(sums))
    meter.end(*halves[0])
    together, alone = meter.reading(), read((rollouts, DirectionalScores(scores.slope, scores.curvature)))
    for name in ("peak", "peak_low", "peak_high", "break_even", "end_slope", "end_slope_stderr", "success",
                 "n_prompts"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
    assert together.bins == alone.bins or all(
        a == pytest.approx(b, nan_ok=True) for x, y in zip(together.bins, alone.bins, strict=True)
        for a, b in zip(vars(x).values(), vars(y).values(), strict=True))


def test_state_goes_through_a_file(tmp_path):
    meter = StepMeter(smoothing=0.5)
    meter.start(*start_of_step(), held_out=True)
    meter.end(*end_of_step(seed=1), length=2.0)
    meter.start(*start_of_step(seed=7), held_out=True, length=2.0)
    torch.save(meter.state_dict(), tmp_path / "state")
    other = StepMeter(smoothing=0.5)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for m in (meter, other):
        m.end(*end_of_step(seed=2), length=2.0)
    assert meter.reading().summary() == pytest.approx(other.reading().summary(), nan_ok=True)
    meter.reset()
    assert repr(meter) == "StepMeter(nothing measured yet)"


def test_summary_is_flat_and_safe_for_loggers_that_reduce_by_name():
    summary = read(end_of_step(0.3)).summary()
    assert all(isinstance(value, float) for value in summary.values())
    assert all(name.startswith("rlvr/step/meter/") and "min" not in name and "max" not in name for name in summary)
    assert summary["rlvr/step/meter/verdict_code"] == 2.0


def test_the_exact_policy_gives_the_exact_peak():
    """A sample in which every response occurs as often as it should; the step ends short of the peak.

    The fitted parabola is no more than that: 1 % off at this J, as the quadratic model is known to be.
    """
    policy, rollouts = SignPolicy.exact_sample(6, 2, n_prompts=2)
    step = 0.2 * policy.break_even
    before, ahead = policy.moved(-step), policy.moved(step)
    logp = policy.logp_of(rollouts)
    sums = [torch.segment_reduce(p.logp_of(rollouts) - logp, "sum", lengths=rollouts.lengths) for p in (ahead, before)]
    scores = DirectionalScores.from_log_ratios(*sums)
    reading = StepMeter()
    reading.end(rollouts, scores)
    gain = policy.success_rate() - before.success_rate()
    assert reading.reading().end_slope == pytest.approx(
        (policy.moved(1e-4).success_rate() - policy.moved(-1e-4).success_rate()) / 2e-4 * step, rel=0.05)
    assert -float(torch.expm1(scores.behind)[rollouts.correct].sum() / rollouts.n_responses) == pytest.approx(
        gain, rel=1e-9)
