"""The step-size sweep: its task and sampler, its definitions, and that its figures follow from the logs alone."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import step_size_sweep  # noqa: E402
from step_sizes import claims, definitions, fidelity, forecasts, shared_prompts  # noqa: E402
from step_sizes.chained_sums import ChainedSums  # noqa: E402
from step_sizes.log import Evidence, RunLog, StepLog, read_log, write_log  # noqa: E402
from step_sizes.probe import log_ratios, true_success  # noqa: E402
from step_sizes.records import Reading, Run, Slope, Step  # noqa: E402
from step_sizes.replay import Replay, replay  # noqa: E402
from step_sizes.settings import QUICK, RunSettings  # noqa: E402
from step_sizes.store import read_runs, write_runs  # noqa: E402
from step_sizes.training import EPSILON  # noqa: E402

import rlvr_fast as rf  # noqa: E402
from rlvr_fast.demo import sampling  # noqa: E402
from rlvr_fast.demo.model import Policy, repeat_cache  # noqa: E402
from rlvr_fast.demo.task import VOCABULARY_SIZE  # noqa: E402

SETTINGS = RunSettings(n_totals=3, learning_rate=1e-3, seed=0)


# -- task and sampler -------------------------------------------------------------------------------------------------

def test_the_running_totals_and_nothing_else_are_rewarded():
    task = ChainedSums(3)
    problems = torch.tensor([[3, 8, 5, 2], [9, 9, 9, 9]])
    right = torch.tensor([[1, 6, 8, task.END], [8, 7, 6, task.END]])
    assert torch.equal(task.answer_tokens(problems)[0], right)
    assert task.verify(right, problems).tolist() == [1, 1]
    for column in range(4):
        wrong = right.clone()
        wrong[:, column] = (wrong[:, column] + 1) % VOCABULARY_SIZE
        assert task.verify(wrong, problems).tolist() == [0, 0]


def test_chains_to_train_on_and_held_out_chains_are_disjoint():
    problems, held_out = ChainedSums(3).split_problems(100, torch.Generator().manual_seed(0))
    chains = [tuple(chain) for chain in torch.cat([problems, held_out]).tolist()]
    assert len(held_out) == 100
    assert len(set(chains)) == len(chains) > 8000


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy(VOCABULARY_SIZE, ChainedSums(3).sequence_length, width=16, n_heads=2)


class FirstTokenCounts(ChainedSums):
    """An untrained policy never gets a chain right; this reward it does get, and not always."""

    def verify(self, completions: torch.Tensor, problems: torch.Tensor) -> torch.Tensor:
        return (completions[:, 0] < 6).float()


@pytest.fixture(scope="module")
def samples(policy) -> sampling.Samples:
    task = FirstTokenCounts(3)
    problems, _ = task.split_problems(100, torch.Generator().manual_seed(0))
    return sampling.sample(policy, problems[:24], 8, torch.Generator().manual_seed(1), task)


@torch.no_grad()
def test_the_cache_changes_nothing_but_the_work(policy):
    tokens = torch.randint(VOCABULARY_SIZE, (3, 9), generator=torch.Generator().manual_seed(0))
    whole = policy(tokens)
    first, cache = policy.with_cache(tokens[:, :4], None)
    rest, cache = policy.with_cache(tokens[:, 4:8], cache)  # several tokens at once
    last, _ = policy.with_cache(tokens[:, 8:], cache)
    torch.testing.assert_close(torch.cat([first, rest, last], 1), whole, rtol=1e-4, atol=1e-5)  # float32 rounding
    again, _ = policy.with_cache(tokens[:, 8:].repeat_interleave(2, 0), repeat_cache(cache, 2))
    torch.testing.assert_close(again, last.repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shared_prompts_give_the_same_log_probs(policy, samples):
    torch.testing.assert_close(shared_prompts.completion_logp(policy, samples),
                               sampling.completion_logp(policy, samples), rtol=1e-4, atol=1e-5)  # float32 rounding


# -- from the log to the figures --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def update(policy) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {parameter: 0.01 * torch.randn(parameter.shape, generator=generator) for parameter in policy.parameters()}


@pytest.fixture(scope="module")
def evidence(policy, samples, update) -> Evidence:
    multiples = (-1.0, -EPSILON, EPSILON, 0.5, 1.0, 2.0)
    with torch.no_grad():
        logp = shared_prompts.completion_logp(policy, samples)
    return Evidence(multiples, log_ratios(policy, update, multiples, samples, logp).float(),
                    samples.rollouts.correct, 8)


def test_a_scan_from_the_log_is_the_scan_of_the_policy(policy, samples, update, evidence):
    live = rf.scan_step(lambda: sampling.completion_logp(policy, samples), list(update), update, samples.rollouts,
                        multiples=(0.5, 1, 2), in_sample=False)
    logged = Replay(evidence).scan()
    assert logged.multiples == live.multiples
    assert live.success_gain.abs().min() > 1e-3
    # the log keeps float32 log-ratios of float32 log-probs: 1e-6 in ℓ
    torch.testing.assert_close(logged.success_gain, live.success_gain, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(logged.ess, live.ess, rtol=1e-3, atol=1e-6)
    assert (logged.verdict, logged.reason) == (live.verdict, live.reason)


def test_a_slope_from_the_log_is_the_covariance_of_score_and_reward(policy, samples, update, evidence):
    logp = sampling.completion_logp(policy, samples)
    total = torch.segment_reduce(logp, "sum", lengths=samples.rollouts.lengths)
    reward = samples.rollouts.correct.float().view(-1, 8)
    weights = ((reward - reward.mean(1, keepdim=True)) / 7 / 24).flatten()
    gradients = torch.autograd.grad((weights * total).sum(), list(policy.parameters()), allow_unused=True)
    exact = sum((g * update[p]).sum().item() for g, p in zip(gradients, policy.parameters(), strict=True)
                if g is not None)
    # central differences over 1/32 of the step: third derivatives and float32 rounding over 2/32
    assert Replay(evidence).slope().value == pytest.approx(exact, rel=0.02, abs=1e-5)


def test_truth_is_evaluated_along_the_update_and_leaves_the_policy_as_it_was(policy, update):
    task = ChainedSums(3)
    problems = task.split_problems(50, torch.Generator().manual_seed(0))[1]
    before = [parameter.clone() for parameter in policy.parameters()]
    found = true_success(policy, update, (0.5, 1.0), problems, task)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += update[parameter]
    assert sampling.exact_success(policy, problems, task) == pytest.approx(found[1], rel=1e-5)
    with torch.no_grad():
        for parameter, start in zip(policy.parameters(), before, strict=True):
            parameter.copy_(start)


def test_a_log_survives_the_disk_and_replays_without_what_comes_later(tmp_path, evidence):
    """Verdicts before step k may not depend on anything that was measured after it."""
    evidence = Evidence(evidence.multiples, evidence.log_ratios / 4, evidence.correct, 8)
    steps = [StepLog(k, 1e-3, 1.0, 0.3, 0.31, {0.5: 0.305, 2.0: 0.3}, evidence, evidence, {}) for k in range(3)]
    write_log(tmp_path / "run.pt", RunLog(SETTINGS, steps))
    log = read_log(tmp_path / "run.pt")
    assert log.settings == SETTINGS
    assert torch.equal(log.steps[0].start.log_ratios, evidence.log_ratios)
    run = replay(log)
    other = Evidence(evidence.multiples, -evidence.log_ratios, evidence.correct, 8)
    changed = replay(RunLog(SETTINGS, [*steps[:2], StepLog(2, 1e-3, 1.0, 0.3, 0.2, {}, evidence, other, {})]))
    assert math.isfinite(run.steps[2].meter.break_even)
    assert changed.steps[2].meter == run.steps[2].meter
    assert forecasts.two_ended(changed)[2] == forecasts.two_ended(run)[2]
    assert changed.steps[2].end.value == pytest.approx(-run.steps[2].end.value, rel=0.05)
    assert run.steps[0].meter.verdict == "undetermined"  # nothing had ended yet


# -- definitions and counts -------------------------------------------------------------------------------------------

def step_of(k: int, before: float, after: float, slope: float = 0.02, end: float = 0.0, verdict: str = "undetermined",
            norm: float = 1.0, truth: dict | None = None, stderr: float = 0.001) -> Step:
    return Step(k, 1e-3, norm, before, after, truth or {}, Slope(slope, stderr), Slope(end, stderr),
                Reading("undetermined", math.inf), "within error", 0.0, 0.01, Reading(verdict, 1.0), {})


def run_of(success: list[float], verdicts: list[str] | None = None, **options) -> Run:
    verdicts = verdicts or ["undetermined"] * (len(success) - 1)
    steps = [step_of(k, success[k], success[k + 1], verdict=verdict, **options) for k, verdict in enumerate(verdicts)]
    return Run(SETTINGS, success[0], steps)


def test_collapse_is_half_of_the_highest_so_far():
    assert definitions.collapse_step(run_of([0.4, 0.6, 0.31, 0.29, 0.6])) == 2
    assert definitions.collapse_step(run_of([0.4, 0.3, 0.21])) is None


def test_the_lead_counts_steps_from_announcement_to_collapse():
    run = run_of([0.4, 0.5, 0.4, 0.3, 0.2, 0.1])
    for verdicts, lead in ((["undetermined", "overshoot", "near", "near", "near"], 2),
                           (["near", "near", "near", "overshoot", "near"], 0),
                           (["near", "near", "near", "near", "overshoot"], -1), (["near"] * 5, -1)):
        assert definitions.collapse_step(run) == 3
        assert definitions.lead(run, verdicts) == lead
    assert definitions.lead(run_of([0.4, 0.5]), ["overshoot"]) is None


def test_announcements_tell_collapses_from_false_alarms():
    x, unknown = "overshoot", "undetermined"
    runs = [run_of([0.4, 0.5, 0.3, 0.1], [unknown, x, unknown]), run_of([0.4, 0.5, 0.3, 0.1]),
            run_of([0.4, 0.41, 0.5, 0.6], [unknown, x, unknown]), run_of([0.4, 0.41, 0.3, 0.3], [unknown, x, unknown])]
    found = claims.announcements(runs, claims.METHODS["meter"])
    assert found == {"collapsed": 2, "collapsed_at_the_first_step": 0, "announced": 1,
                     "announced_of_the_later_ones": 1, "announced_a_step_before": 1, "median_lead": 1,
                     "median_success_kept": 1.0, "collapsing_step_cleared": 0, "not_collapsed": 2,
                     "not_collapsed_but_announced": 2, "of_these_degraded": 1}
    outcomes = claims.verdict_outcomes(runs, claims.METHODS["meter"])
    assert (outcomes["overshoot"]["steps"], outcomes["overshoot"]["lost"]) == (3, pytest.approx(2 / 3))


def test_the_two_ended_forecast_is_exact_for_a_parabola_at_any_length():
    """J = a n − b n²/2 per unit of length: break-even of every step at length 2a/b = 4."""
    a, b = 0.02, 0.01
    steps = [step_of(k, 0.3, 0.3 + a * n - b * n * n / 2, slope=a * n, end=a * n - b * n * n, norm=n,
                     stderr=1e-5) for k, n in enumerate((0.5, 1.0, 2.0, 6.0))]
    found = forecasts.two_ended(Run(SETTINGS, 0.3, steps))
    assert math.isnan(found[0].break_even)
    assert [forecast.break_even for forecast in found[1:]] == pytest.approx([4, 2, 4 / 6])
    assert [forecast.verdict for forecast in found] == ["undetermined", "safe", "near", "overshoot"]
    assert [forecasts.own_ends(step).break_even for step in steps] == pytest.approx([8, 4, 2, 4 / 6])


def test_the_true_break_even_is_exact_for_a_parabola_and_known_where_it_was_evaluated():
    gain = {m: 0.3 + 0.03 * m * (1 - m / 1.5) for m in (0.25, 0.5, 1.0, 2.0)}
    truth = {m: value for m, value in gain.items() if m != 1}
    assert forecasts.true_break_even(step_of(0, 0.3, gain[1.0], truth=truth)) == pytest.approx(1.5)
    assert math.isnan(forecasts.true_break_even(step_of(0, 0.3, gain[1.0])))
    assert forecasts.true_break_even(step_of(0, 0.3, 0.31, truth={0.5: 0.305, 2.0: 0.32})) == math.inf


def test_thresholds_count_runs_by_their_determined_fractions():
    """Slope a, end a − c, unit length: fraction c/2a."""
    calm = run_of([0.3, 0.31, 0.32, 0.33], slope=0.02, end=0.01)  # 0.25
    wild = run_of([0.3, 0.25, 0.2, 0.1], slope=0.02, end=-0.06)  # 2
    noise = run_of([0.3, 0.3, 0.3], slope=0.001, end=0.0)
    found = claims.thresholds([calm, wild, noise])
    gain = pytest.approx((0.31 + 0.32 + 0.33) / 3 - 0.3)
    assert found == {"runs": 3, "without_a_determined_step": 1, "below": 1, "below_and_collapsed": 0,
                     "below_lowest_gain": gain, "below_highest_gain": gain, "between": 0, "above": 1,
                     "above_and_degraded": 1, "above_and_lower_after_horizon": 1, "above_and_collapsed": 1}


def test_rank_correlation_and_agreement():
    assert fidelity.rank_correlation([1, 2, 3, math.inf], [10, 20, 30, 40]) == pytest.approx(1)
    assert fidelity.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    pairs = [fidelity.Pair(0.5, 0.25, True), fidelity.Pair(2.0, 2.0, True), fidelity.Pair(3.0, 0.5, True),
             fidelity.Pair(9.0, math.inf, True), fidelity.Pair(9.0, 1.0, False), fidelity.Pair(0.1, 0.0, True)]
    found = fidelity.agreement(pairs, 0.125, 4)
    assert (found["steps"], found["determined"], found["inside"], found["side"]) == (6, 5, 3, 0.8)
    assert found["ratio"][2] == 2.0
    assert found["within_factor_2"] == pytest.approx(1 / 3)  # 2 itself is not within


def test_stored_runs_come_back(tmp_path):
    rate = SETTINGS.rate_at(0)
    run = Run(SETTINGS, 0.3, [Step(0, rate, 0.0123, 0.3, 0.31234, {0.5: 0.305, 2.0: 0.29}, Slope(0.0123, 0.00456),
                                   Slope(math.nan, math.nan), Reading("near", math.inf), "", 0.0111, 0.00222,
                                   Reading("overshoot", 0.789), {})])
    guarded = Run(replace(SETTINGS, guard="scale"), 0.3,
                  [Step.guarded(0, rate, 0.0123, 0.3, 0.31234, {"scale": 0.5, "break_even_rate": math.inf})])
    write_runs(tmp_path / "steps.json", [run, guarded])
    for stored, found in zip((run, guarded), read_runs(tmp_path / "steps.json"), strict=True):
        assert (found.settings, found.start, repr(found.steps)) == (stored.settings, 0.3, repr(stored.steps))


# -- the whole script -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sweep")
    done = subprocess.run([sys.executable, str(EXAMPLES / "step_size_sweep.py"), "--quick", "--output", str(output)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Final success" in done.stdout
    return output


def test_the_script_logs_every_run_and_step(quick_run):
    runs = read_runs(quick_run / "steps.json")
    assert [run.settings for run in runs] == QUICK.runs()
    for run in runs:
        assert (quick_run / "runs" / f"{run.settings.name}.pt").exists()
        assert all(later.before == step.after for step, later in pairwise(run.steps))
    assert {run.start for run in runs if run.settings.length == 3} == {runs[0].start}  # one warm-up for all rates
    assert sorted(path.name for path in quick_run.glob("*.png")) == ["before.png", "break_even.png", "sweep.png"]


def test_plotting_alone_needs_no_logs_and_finds_the_same_numbers(quick_run, tmp_path, monkeypatch):
    (tmp_path / "steps.json").write_text((quick_run / "steps.json").read_text())
    monkeypatch.setattr(sys, "argv", ["step_size_sweep.py", "--quick", "--plot-only", "--output", str(tmp_path)])
    step_size_sweep.main()
    assert (tmp_path / "sweep.json").read_text() == (quick_run / "sweep.json").read_text()
    assert not (tmp_path / "runs").exists()


def test_a_selection_that_leaves_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_size_sweep.py", "--lengths", "5"])
    with pytest.raises(SystemExit):
        step_size_sweep.parse_arguments()
    assert "the sweep has lengths 4, 8, 16" in capsys.readouterr().err
