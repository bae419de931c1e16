"""StepGuard: it stays an optimizer, it keeps a loop from collapsing, and it never leaves anything half done."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast.simulate.lines import success
from rlvr_fast.simulate.problems import SignTask, sample
from rlvr_fast.step.guard import StepGuard, StepWarning
from rlvr_fast.step.meter import StepMeter

TASK = SignTask(64, (4, 8, 12))
START, OPTIMUM = 0.2, float(success(TASK, torch.zeros(1, dtype=torch.float64)))


class Loop:
    """GRPO on the closed-form task: every response's tokens summed, 64 prompts x 8, constant learning rate."""

    def __init__(self, rate, mode=None, *, optimizer=torch.optim.SGD, seed=0, task=TASK, **options):
        self.task, self.theta = task, torch.nn.Parameter(torch.tensor([START], dtype=torch.float64))
        self.optimizer = optimizer([self.theta], lr=rate)
        options = {"share": None, "start": 1} | options
        self.guard = None if mode is None else StepGuard(self.optimizer, mode, **options)
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self):
        batch = sample(self.task, self.theta.detach(), 64, 8, self.generator)
        return batch.rollouts, lambda: self.task.logp(self.theta, batch)

    def gradients(self):
        rollouts, logp_fn = self.sample()
        if self.guard is not None:
            self.guard.observe(logp_fn, rollouts)
        weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "seq_mean_token_sum")
        self.optimizer.zero_grad()
        (-(weights.double() * logp_fn()).sum()).backward()

    def step(self):
        self.gradients()
        if self.guard is not None and self.guard.mode == "backtrack":
            held_out, logp_fn = self.sample()
            self.guard.check_with(logp_fn, held_out)
        (self.guard or self.optimizer).step()

    def run(self, n_steps=20):
        rates = []
        for _ in range(n_steps):
            self.step()
            rates.append(float(success(TASK, self.theta.detach())))
        return rates


# -- what it is for ---------------------------------------------------------------------------------------------------


def test_scale_calms_a_learning_rate_that_does_not_settle():
    """At 0.1 the unguarded run is thrown about between 5 and 70 %; guarded, only its first step is."""
    unguarded, guarded = Loop(0.1).run(), Loop(0.1, "scale").run()
    assert min(unguarded[5:]) < 0.2
    assert min(guarded[5:]) > 0.6
    assert guarded[-1] > OPTIMUM - 0.01


def test_backtrack_survives_a_first_step_that_ends_everything():
    """At 0.2 the first step goes to zero success, where there is nothing left to learn from."""
    unguarded, loop = Loop(0.2).run(5), Loop(0.2, "backtrack")
    assert max(unguarded) < 1e-3
    guarded = loop.run()
    assert min(guarded) > 0.5
    assert guarded[-1] > OPTIMUM - 0.01
    assert loop.guard.n_backtracks > 0


def test_scale_survives_such_a_first_step_by_beginning_carefully():
    """Which is the default: with ``start=1`` nothing that is measured later can help."""
    assert max(Loop(0.2, "scale").run(5)) < 1e-3
    guarded = Loop(0.2, "scale", start=0.2).run()
    assert min(guarded) > 0.5
    assert guarded[-1] > OPTIMUM - 0.01


def test_a_careful_start_grows_by_itself_and_ends():
    """Also where nothing is ever measured, behind a warm-up from 0, and in a state that was saved."""
    model, inner, guard = quadratic(mode="scale", start=0.2)
    scales = []
    for step in range(8):
        inner.param_groups[0]["lr"] = 0.0 if step == 0 else 0.1
        model(torch.ones(1, 3)).sum().backward()
        guard.step()
        scales.append(guard.scale)
    assert scales == pytest.approx([1.0, 0.2, 0.3, 0.45, 0.675, 1.0, 1.0, 1.0])
    loop = Loop(0.01, "scale", start=0.2)
    loop.run(8)
    assert loop.guard.scale == 1.0
    other = Loop(0.01, "scale", start=0.2)
    other.guard.load_state_dict(copy.deepcopy(loop.guard.state_dict()))
    other.guard.step()
    assert other.guard.scale == 1.0


@pytest.mark.parametrize(("reason", "growth"), [
    ("within error", 1.5), ("no contrast", 1.0), ("scarce class", 1.0), ("sample gone", 1.0)])
def test_a_step_does_not_grow_where_nothing_could_be_seen(reason, growth):
    loop = Loop(0.01, "scale", start=0.2)
    loop.run(3)
    reading = dataclasses.replace(loop.guard.meter.reading(), verdict="undetermined", reason=reason,
                                  break_even=math.inf, break_even_high=math.inf)
    loop.guard._learn(reading)
    assert loop.guard.allowed_rate == pytest.approx(growth * loop.guard._length)


@pytest.mark.parametrize("mode", ["scale", "backtrack"])
def test_a_safe_learning_rate_is_left_alone(mode):
    loop, free = Loop(0.01, mode), Loop(0.01)
    assert loop.run(4)[-1] == pytest.approx(free.run(4)[-1], abs=0.05)
    assert loop.guard.scale == 1.0
    assert loop.guard.n_backtracks == 0


def test_backtrack_works_with_adam_s_momentum():
    """At 0.5 momentum carries the unguarded run to 1 % and keeps it there; "scale" hardly helps against that."""
    unguarded, scaled, guarded = (Loop(0.5, mode, optimizer=torch.optim.Adam).run(20)
                                  for mode in (None, "scale", "backtrack"))
    assert min(unguarded) < 0.05
    assert min(scaled) < 0.2
    assert min(guarded) > 0.5
    assert guarded[-1] > OPTIMUM - 0.02


def test_warn_speaks_before_the_step_that_hurts_and_changes_nothing():
    loop, free = Loop(0.05, "warn"), Loop(0.05)
    warned, fell, before = [], [], float(success(TASK, loop.theta.detach()))
    for k in range(12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop.step()
        free.step()
        after = float(success(TASK, loop.theta.detach()))
        if any(issubclass(w.category, StepWarning) for w in caught):
            assert "times the one at which the step breaks even" in str(caught[0].message)
            warned.append(k)
        if after < before - 0.01:
            fell.append(k)
        before = after
    assert torch.equal(loop.theta, free.theta)
    assert len(set(warned) & set(fell)) >= 0.75 * len(set(fell) - {0, 1})  # not before there was a measurement
    assert fell


def test_the_measured_break_even_is_the_true_one():
    """Steps toward the optimum break even at twice their distance: in learning rates, 2|θ|/|gradient|."""
    ratios = []
    for seed in range(8):
        loop = Loop(1.0, "warn", seed=seed, task=SignTask(16, (2, 4)))
        loop.gradients()
        true = 2 * START / abs(loop.theta.grad.item())
        loop.optimizer.param_groups[0]["lr"] = 0.7 * true
        loop.guard.step()
        loop.gradients()
        ratios.append(loop.guard.break_even_rate / true)
    found = torch.tensor(ratios)
    assert found.isfinite().sum() >= 6
    assert found.median().item() == pytest.approx(1, abs=0.15)


# -- it stays an optimizer --------------------------------------------------------------------------------------------


def quadratic(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    inner = optimizer(model.parameters(), lr=0.1)
    return model, inner, StepGuard(inner, **({"start": 1} | options))


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


def test_groups_state_and_hooks_are_the_wrapped_optimizer_s():
    model, inner, guard = quadratic()
    assert isinstance(guard, torch.optim.Optimizer)
    assert guard.param_groups is inner.param_groups
    assert guard.defaults is inner.defaults
    called = []
    guard.register_step_pre_hook(lambda *_: called.append("before"))
    inner.register_step_post_hook(lambda *_: called.append("after"))
    take_step(model, guard)
    assert called == ["before", "after"]
    assert guard.state is inner.state
    assert len(guard.state) == 2
    guard.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.1, 0.5]
    guard.zero_grad()
    assert model.weight.grad is None
    assert "AdamW" in repr(guard)
    assert guard.step(lambda: 3.0) == 3.0  # a closure goes through


@pytest.mark.parametrize("on_guard", [True, False])
def test_schedulers_see_their_own_learning_rate(on_guard):
    model, inner, guard = quadratic(mode="scale")
    scheduler = torch.optim.lr_scheduler.LambdaLR(guard if on_guard else inner, lambda k: 1 / (1 + k))
    guard.allowed_rate, guard.n_measured = 0.02, 1  # as if it had been measured
    seen, moved = [], []
    inner.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be one
        for _ in range(7):
            take_step(model, guard)
            moved.append(guard.param_groups[0]["lr"])
            scheduler.step()
    assert moved == pytest.approx([0.1 / (1 + k) for k in range(7)])
    assert seen == pytest.approx([min(0.02, 0.1 / (1 + k)) for k in range(7)])


def test_a_scaled_step_is_the_step_at_that_learning_rate():
    model, _, guard = quadratic(mode="scale")
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW(other.parameters(), lr=0.03)
    guard.allowed_rate, guard.n_measured = 0.03, 1  # as if it had been measured
    for _ in range(3):
        take_step(model, guard)
        take_step(other, plain)
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-6, atol=1e-7)
    assert guard.scale == pytest.approx(0.3)


def test_a_tensor_learning_rate_comes_back_as_the_same_tensor():
    model = torch.nn.Linear(3, 2)
    rate = torch.tensor(0.1)
    guard = StepGuard(torch.optim.Adam(model.parameters(), lr=rate), "scale")
    guard.allowed_rate, guard.n_measured = 0.05, 1  # as if it had been measured
    take_step(model, guard)
    assert guard.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
    assert guard.scale == pytest.approx(0.5)


def test_works_under_a_grad_scaler():
    model, _, guard = quadratic(torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = model.weight.detach().clone()
    loss = model(torch.ones(4, 3)).square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(guard)
    gradient = model.weight.grad.clone()
    scaler.step(guard)
    scaler.update()
    torch.testing.assert_close(model.weight, before - 0.1 * gradient)
    model.weight.grad.fill_(math.inf)
    kept = model.weight.detach().clone()
    scaler.step(guard)
    assert torch.equal(model.weight, kept)
    assert guard.n_steps == 1


def test_state_goes_with_the_optimizer_s_and_a_plain_state_is_taken_too(tmp_path):
    loop = Loop(0.05, "scale", optimizer=torch.optim.Adam)
    loop.run(4)
    loop.gradients()  # its last step is measured
    torch.save(loop.guard.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    other = Loop(0.9, "scale", optimizer=torch.optim.Adam)
    other.guard.load_state_dict(state)
    assert other.optimizer.param_groups[0]["lr"] == 0.05
    for name in ("break_even_rate", "allowed_rate", "n_steps", "n_measured"):
        assert getattr(other.guard, name) == getattr(loop.guard, name), name
    assert other.guard.meter.reading().summary() == pytest.approx(loop.guard.meter.reading().summary() | {
        name: math.nan for name in ("rlvr/step/meter/theorem_bound", "rlvr/step/meter/token_bound")}, nan_ok=True)
    fresh = Loop(0.9, "scale", optimizer=torch.optim.Adam)
    fresh.guard.load_state_dict(loop.optimizer.state_dict())
    assert (fresh.guard.n_steps, fresh.guard.allowed_rate) == (0, math.inf)
    loop.optimizer.load_state_dict(loop.guard.state_dict())  # and the other way round


def test_a_guard_can_be_copied():
    _, inner, guard = quadratic()
    again = copy.deepcopy(guard)
    assert again.inner is not inner
    assert again.mode == guard.mode


# -- nothing half done ------------------------------------------------------------------------------------------------


def test_an_observation_that_raises_leaves_everything_as_it_was():
    loop = Loop(0.05, "scale")
    loop.step()
    before, allowed = loop.theta.detach().clone(), loop.guard.allowed_rate
    rollouts, logp_fn = loop.sample()

    def failing():
        if loop.theta.item() != before.item():
            raise RuntimeError("out of memory")
        return logp_fn()

    with pytest.raises(RuntimeError, match="out of memory"):
        loop.guard.observe(failing, rollouts)
    assert torch.equal(loop.theta, before)
    assert loop.guard.allowed_rate == allowed
    assert loop.guard.due
    assert loop.guard.n_measured == 0
    assert loop.guard.observe(logp_fn, rollouts) is not None  # and can be tried again
    assert not loop.guard.due
    assert loop.guard.observe(logp_fn, rollouts) is None


def test_a_check_that_raises_leaves_a_whole_step():
    loop, free = Loop(0.01, "backtrack", optimizer=torch.optim.Adam), Loop(0.01, optimizer=torch.optim.Adam)
    loop.gradients()
    free.gradients()
    held_out, logp_fn = loop.sample()
    loop.guard.check_with(logp_fn, held_out)
    calls = []

    def failing():
        calls.append(1)
        raise RuntimeError("out of memory")

    loop.guard._check = (failing, *loop.guard._check[1:])
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.guard.step()
    free.optimizer.step()
    assert torch.equal(loop.theta, free.theta)
    assert loop.optimizer.param_groups[0]["lr"] == 0.01
    assert loop.guard._check is None
    assert calls == [1]


def test_an_optimizer_that_raises_keeps_the_scheduled_learning_rate():
    model, inner, guard = quadratic(mode="scale")
    guard.allowed_rate, guard.n_measured = 0.01, 1  # as if it had been measured

    def fail(*_):
        raise RuntimeError("no")

    inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        take_step(model, guard)
    assert inner.param_groups[0]["lr"] == 0.1


def test_an_undone_step_leaves_the_same_bits():
    loop = Loop(50.0, "backtrack")  # so long that no shortening reaches back
    before = loop.theta.detach().clone()
    loop.step()
    assert torch.equal(loop.theta, before)
    assert (loop.guard.n_backtracks, loop.guard.n_undone, loop.guard.scale) == (4, 1, 0.0)
    assert not loop.guard.due  # a step of no length is not measured


def test_a_shortened_step_is_remembered_at_its_length():
    loop = Loop(0.2, "backtrack")
    loop.step()
    guard, moved = loop.guard, loop.theta.item() - START
    assert guard.n_backtracks >= 1
    assert guard.scale == 0.5 ** guard.n_backtracks
    assert moved == pytest.approx(-0.2 * guard.scale * loop.theta.grad.item())
    assert guard._length == pytest.approx(0.2 * guard.scale)
    assert guard._update[loop.theta].item() == pytest.approx(moved)


def test_a_check_that_cannot_compare_lets_the_step_pass():
    """One prompt, and prompts that are all solved, say nothing about a change."""
    loop = Loop(0.01, "backtrack")
    for margins, n_prompts in (((4,), 1), ((62,), 16)):
        task = SignTask(64, margins)
        batch = sample(task, loop.theta.detach(), n_prompts, 8, loop.generator)
        loop.gradients()
        loop.guard.check_with(lambda t=task, b=batch: t.logp(loop.theta, b), batch.rollouts)
        before = loop.theta.detach().clone()
        loop.guard.step()
        assert not torch.equal(loop.theta, before)
    assert loop.guard.n_backtracks == 0


def test_a_check_counts_for_one_step_alone():
    loop = Loop(50.0, "backtrack")
    loop.step()
    loop.gradients()
    loop.guard.step()  # no check given
    assert abs(loop.theta.item()) > 1


# -- schedule, metrics, refusals --------------------------------------------------------------------------------------


def test_measures_on_schedule():
    loop = Loop(0.01, "warn", every=3)
    due = []
    for _ in range(7):
        loop.step()
        due.append(loop.guard.due)
    assert due == [True, False, False, True, False, False, True]
    assert loop.guard.n_measured == 2


def test_measures_within_its_share_of_the_time(monkeypatch):
    """A clock on which a measurement takes 1 s and everything else 0.1 s: at a share of 10 % every 90th step."""
    now = [0.0]
    monkeypatch.setattr("rlvr_fast.step.guard.time.perf_counter", lambda: now[0])
    loop, measured = Loop(0.001, "warn", share=0.1), []
    for k in range(200):
        rollouts, logp_fn = loop.sample() if loop.guard.due else (None, None)

        def slow(logp_fn=logp_fn):
            now[0] += 0.5
            return logp_fn()

        if loop.guard.due:
            with torch.no_grad():
                logp = logp_fn()
            loop.guard.observe(slow, rollouts, logp=logp)
            measured.append(k)
        loop.theta.grad = torch.zeros_like(loop.theta) + 1e-3
        now[0] += 0.1
        loop.guard.step()
    assert measured[:2] == pytest.approx([1, 92], abs=2)
    assert len(measured) == 3
    assert loop.guard.metrics()["rlvr/step/guard/cost_share"] < 0.14  # 0.1, and one measurement that opens a round


def test_metrics_are_flat_and_safe_for_loggers_that_reduce_by_name():
    loop = Loop(0.02, "scale")
    first = loop.guard.metrics()
    loop.run(3)
    metrics = loop.guard.metrics()
    assert first["rlvr/step/guard/break_even_rate"] == math.inf
    for found in (first, metrics):
        assert all(isinstance(value, float) for value in found.values())
        assert all(name.startswith("rlvr/step/") and "min" not in name and "max" not in name for name in found)
    assert metrics["rlvr/step/guard/measured"] == 2
    assert "rlvr/step/meter/break_even" in metrics


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda o: StepGuard(3), TypeError, "optimizer must be a torch.optim.Optimizer"),
    (lambda o: StepGuard(o, "brake"), ValueError, "mode must be one of warn, scale, backtrack"),
    (lambda o: StepGuard(o, fraction=1.0), ValueError, "fraction must be below 1"),
    (lambda o: StepGuard(o, start=1.5), ValueError, "start must be at most 1"),
    (lambda o: StepGuard(o, start=0), ValueError, "start must be"),
    (lambda o: StepGuard(o, every=0), ValueError, "every must be an int >= 1"),
    (lambda o: StepGuard(o, share=2), ValueError, "share must be at most 1"),
    (lambda o: StepGuard(o, meter=3), TypeError, "meter must be a StepMeter"),
    (lambda o: StepGuard(o, meter=StepMeter(reduce=print)), ValueError, "share must be None with a meter that reduces"),
    (lambda o: StepGuard(o).check_with(print, None), ValueError, "check_with needs mode 'backtrack'"),
    (lambda o: StepGuard(o, "backtrack").check_with(3, None), TypeError, "logp_fn must be callable"),
    (lambda o: StepGuard(o, "backtrack").check_with(lambda: torch.zeros(3), None), TypeError, "rollouts must be"),
], ids=range(12))
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
