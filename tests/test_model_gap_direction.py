"""Directions to hold a gap against, and what a step owes to having been made from the rollouts that judge it.

``propose`` is held to equality of bits. Sketches as large as the layers lose nothing, so a float64 model gives every
inner product up to the order of summation: 1e-10 of the largest.
"""

from __future__ import annotations

import copy
from functools import partial

import model_zoo as zoo
import pytest
import torch
from policies import TabularPolicy
from test_model_gap import step

import rlvr_fast as rf
import rlvr_fast.reference as ref
from rlvr_fast import Rollouts
from rlvr_fast.model_gap import direction as directions
from rlvr_fast.model_gap import result
from rlvr_fast.model_gap.interference import Interference
from rlvr_fast.model_gap.result import Coverage

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1), "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "nesterov, foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "maximize, fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, maximize=True, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01), "adam, foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "adam, fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "adamw, amsgrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw, tensor lr": partial(torch.optim.AdamW, lr=torch.tensor(0.01), weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1), "nadam": partial(torch.optim.NAdam, lr=0.01),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01), "asgd": partial(torch.optim.ASGD, lr=0.01),
}


def parameters_with_gradients(generator, dtype=torch.float32) -> list[torch.nn.Parameter]:
    """Of several shapes; the third has no gradient, the last requires none."""
    parameters = [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))
                  for shape in ((4, 3), (5,), (2, 2), (3, 1), (2,))]
    parameters[-1].requires_grad_(False)
    draw_gradients(parameters, generator)
    return parameters


def draw_gradients(parameters, generator) -> None:
    for p in (parameters[0], parameters[1], parameters[3]):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(kind, parameters) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind]([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.003}])


def everything(optimizer, parameters) -> dict:
    """All that a step could change, as (identity, bits)."""
    def image(value):
        if isinstance(value, torch.Tensor):
            return id(value), value.detach().clone().view(-1).view(torch.uint8).tolist()
        if isinstance(value, dict):
            return id(value), {id(k) if isinstance(k, torch.Tensor) else k: image(v) for k, v in value.items()}
        return [image(v) for v in value] if isinstance(value, list | tuple) else value

    return {"optimizer": image(vars(optimizer)), "values": image(parameters),
            "grads": image([p.grad for p in parameters])}


# -- the step to come -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_elements", [1, 12, 1 << 20])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_proposal_is_the_step_and_leaves_no_trace(kind, steps_before, part_elements, generator, monkeypatch):
    monkeypatch.setattr(directions, "PART_ELEMENTS", part_elements)
    parameters = parameters_with_gradients(generator)
    optimizer = make(kind, parameters)
    for _ in range(steps_before):
        optimizer.step()
        draw_gradients(parameters, generator)
    before, start = everything(optimizer, parameters), [p.detach().clone() for p in parameters]
    update = rf.propose(optimizer)
    assert everything(optimizer, parameters) == before
    optimizer.step()
    assert list(map(id, update)) == list(map(id, parameters[:4]))  # the last requires no gradient
    for p, old in zip(parameters[:4], start, strict=False):
        assert torch.equal(update[p], p.detach() - old)
        assert not update[p].requires_grad
    assert update[parameters[0]].abs().sum() > 0
    assert not update[parameters[2]].any()  # it has no gradient


def test_a_run_with_proposals_is_the_run_without(generator):
    twins = [parameters_with_gradients(torch.Generator().manual_seed(0)) for _ in range(2)]
    runs = [(p, make("adamw, amsgrad", p)) for p in twins]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer in runs]
    for _ in range(4):
        for (parameters, optimizer), schedule in zip(runs, schedules, strict=True):
            if parameters is twins[0]:
                rf.propose(optimizer, parameters[:1])
            optimizer.step()
            schedule.step()
        for parameters in twins:
            draw_gradients(parameters, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(*twins, strict=True))


def test_weight_decay_is_part_of_a_proposal():
    p = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    p.grad = torch.zeros(2)
    assert torch.allclose(rf.propose(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5))[p], -0.05 * p.detach())


class Odd(torch.optim.Optimizer):
    """Keeps its own counters, makes state late, spoils gradients, changes options, moves frozen things not at all."""

    def __init__(self, parameters, fail=False):
        super().__init__(parameters, {"count": 0})
        self.counter, self.history, self.fail = 0, [torch.zeros(2)], fail
        self.inner = torch.optim.Adam([p for g in self.param_groups for p in g["params"] if p.requires_grad], lr=0.1)

    @torch.no_grad()
    def step(self, closure=None):
        self.counter += 1
        self.history[0] += 1
        self.history.append(torch.ones(1))
        self.inner.step()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = {"nested": [{"old": p.clone()}]}
                    p.add_(p.grad)
                    p.grad.zero_()
                    p.grad = None
                if self.fail:
                    raise OSError("half way")


@pytest.mark.parametrize("fail", [False, True])
def test_whatever_an_optimizer_does_is_undone(fail, generator):
    parameters = parameters_with_gradients(generator)
    optimizer = Odd(parameters, fail)
    before = everything(optimizer, parameters), everything(optimizer.inner, parameters)
    if fail:
        with pytest.raises(OSError, match="half way"):
            rf.propose(optimizer)
    else:
        assert rf.propose(optimizer)[parameters[0]].any()
    assert (everything(optimizer, parameters), everything(optimizer.inner, parameters)) == before


def test_only_plain_elementwise_steps_are_taken_in_parts(generator, monkeypatch):
    """Parts are invisible but to code that looks at the step, and to parameters that share memory."""
    monkeypatch.setattr(directions, "PART_ELEMENTS", 1)
    calls = []

    def steps_of(optimizer) -> int:
        calls.clear()
        original = type(optimizer).step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(optimizer), "step", lambda self: calls.append(1) or original(self))
            rf.propose(optimizer)
        return len(calls)

    parameters = parameters_with_gradients(generator)
    assert steps_of(torch.optim.Adam(parameters)) == 4
    assert steps_of(torch.optim.SGD(parameters, lr=0.1)) == 4
    assert steps_of(torch.optim.NAdam(parameters)) == 1
    hooked = torch.optim.Adam(parameters)
    hooked.register_step_post_hook(lambda *_: None)
    assert steps_of(hooked) == 1
    flat = torch.randn(6, generator=generator)
    shared = [torch.nn.Parameter(flat[:3]), torch.nn.Parameter(flat[3:])]
    for p in shared:
        p.grad = torch.ones(3)
    assert steps_of(torch.optim.Adam(shared)) == 1


def test_a_step_that_fails_in_a_later_part_is_undone(generator, monkeypatch):
    monkeypatch.setattr(directions, "PART_ELEMENTS", 1)
    parameters = parameters_with_gradients(generator)
    optimizer = torch.optim.Adam(parameters)
    optimizer.step()
    optimizer.state[parameters[3]]["exp_avg"] = torch.zeros(7)  # does not fit
    before = everything(optimizer, parameters)
    with pytest.raises(RuntimeError, match="shape"):
        rf.propose(optimizer)
    assert everything(optimizer, parameters) == before


def test_sparse_gradients(generator):
    table = torch.nn.Embedding(6, 2, sparse=True)
    table(torch.tensor([1, 4, 4])).square().sum().backward()
    optimizer, start = torch.optim.SparseAdam(table.parameters(), lr=0.1), table.weight.detach().clone()
    gradient = table.weight.grad.to_dense()
    update = rf.propose(optimizer)[table.weight]
    assert torch.equal(table.weight, start)
    assert torch.equal(table.weight.grad.to_dense(), gradient)
    assert update.any(1).tolist() == [False, True, False, False, True, False]


def test_what_cannot_be_proposed_is_refused(generator):
    parameters = parameters_with_gradients(generator)
    with pytest.raises(ValueError, match="without a closure, LBFGS"):
        rf.propose(torch.optim.LBFGS(parameters))
    with pytest.raises(TypeError, match="optimizer must be a torch"):
        rf.propose(parameters)
    optimizer = make("sgd", parameters)
    for wrong, message in ((parameters[0], "iterable of tensors"), ([1.0], r"parameters\[0\] must be a torch.Tensor")):
        with pytest.raises(TypeError, match=message):
            rf.propose(optimizer, wrong)
    with pytest.raises(ValueError, match="distinct"):
        rf.propose(optimizer, [parameters[0]] * 2)
    with pytest.raises(ValueError, match=r"parameters\[1\] must be one that the optimizer moves"):
        rf.propose(optimizer, [parameters[0], torch.zeros(2)])


# -- the last step, and Adam's memory ---------------------------------------------------------------------------------


def test_the_recorder_has_what_the_steps_added(generator):
    parameters = parameters_with_gradients(generator, torch.float64)
    optimizer, recorder = make("adam", parameters), rf.StepRecorder(parameters)
    assert recorder.update is None
    start = [p.detach().clone() for p in parameters]
    with recorder:
        optimizer.step()
        optimizer.step()
    assert len(recorder.update) == 4
    for p, old in zip(parameters[:4], start, strict=False):
        assert torch.equal(recorder.update[p], p.detach() - old)
    kept = recorder.update[parameters[0]].clone()
    held = recorder.update
    with pytest.raises(OSError, match="no step"), recorder:
        raise OSError("no step")
    assert recorder.update is None
    recorder.start()
    with pytest.raises(RuntimeError, match="started already"):
        recorder.start()
    recorder.finish()
    assert not recorder.update[parameters[0]].any()
    assert torch.equal(held[parameters[0]], kept)  # what was given out is left alone
    with pytest.raises(RuntimeError, match="not started"):
        recorder.finish()
    with pytest.raises(ValueError, match="one that requires a gradient"):
        rf.StepRecorder(parameters[4:])
    assert "one step" in repr(recorder)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "betas": (0.9, 0.3)}, {"maximize": True}, {"fused": True}])
def test_adams_memory_is_its_last_step(options, generator):
    parameters = parameters_with_gradients(generator, torch.float64)
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.003}], lr=0.01,
                                  weight_decay=0.0, **options)
    with pytest.raises(ValueError, match="no state yet"):
        rf.adam_direction(optimizer)
    recorder = rf.StepRecorder(parameters)
    for _ in range(3):
        draw_gradients(parameters, generator)
        with recorder:
            optimizer.step()
    direction = rf.adam_direction(optimizer)
    assert len(direction) == 3
    for p, value in direction.items():  # θ' − θ has the rounding of θ
        assert torch.allclose(value, recorder.update[p], rtol=0, atol=1e-14)
    draw_gradients(parameters, generator)
    again = rf.adam_direction(optimizer)
    assert all(torch.equal(again[p], value) for p, value in direction.items())  # nothing of the new gradients


def test_adams_preconditioner_applied_to_gradients(generator):
    """With betas (0, 0.9) the momentum is the gradient, so a frozen preconditioner can be written down."""
    parameters = parameters_with_gradients(generator, torch.float64)
    optimizer = torch.optim.Adam(parameters, lr=0.01, betas=(0.0, 0.9), eps=1e-6)
    optimizer.step()
    p = parameters[0]
    root, gradient = p.grad.abs() + 1e-6, torch.randn(p.shape, generator=generator).double()
    assert torch.allclose(rf.adam_direction(optimizer, {p: gradient})[p], -0.01 * gradient / root, rtol=1e-12)
    twice = rf.adam_direction(optimizer, {p: 2 * gradient})[p]
    assert torch.allclose(twice, 2 * rf.adam_direction(optimizer, {p: gradient})[p], rtol=1e-14)
    with pytest.raises(ValueError, match="no state for a torch"):
        rf.adam_direction(optimizer, {p: gradient, parameters[2]: parameters[2].detach()})
    with pytest.raises(ValueError, match=r"gradients\[...\] must have shape \[4, 3\]"):
        rf.adam_direction(optimizer, {p: gradient[:2]})
    for wrong in (make("rmsprop", parameters), parameters):
        with pytest.raises(TypeError, match=r"must be torch.optim.Adam"):
            rf.adam_direction(wrong)


# -- a gap held against a direction -----------------------------------------------------------------------------------


def measured(batch, model, *, advantages, method="sketch", **options):
    model.zero_grad()
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64, **options) as probe:
        step(model, batch, advantages.double())
    return probe.gap()


def random_batch(generator, n_prompts=3, group_size=6):
    correct = [1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1][:n_prompts * group_size]
    return zoo.sample(generator, group_size, n_prompts, correct=correct)


@pytest.mark.parametrize("length_norm", [True, False])
def test_the_predicted_gain_is_the_slope_of_the_exact_one(length_norm, generator):
    """log mean⁺ρ − log mean⁻ρ at a step of 1e-6: second order and rounding leave 1e-5 of the largest slope."""
    batch, model = random_batch(generator), zoo.build(dtype=torch.float64, tied=True)
    direction = {p: torch.randn(p.shape, generator=generator).double() for p in model.parameters()}
    gap = measured(batch, model, advantages=torch.ones(18), direction=direction, length_norm=length_norm)
    with torch.no_grad():
        before = zoo.token_logp(model(batch.ids), batch.ids)
        for p, delta in direction.items():
            p.add_(delta, alpha=1e-6)
        after = zoo.token_logp(model(batch.ids), batch.ids)
    exact = rf.measure_step(before, after, batch.rollouts).log_odds_gain / 1e-6
    assert (gap.predicted_log_odds_gain - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.equal(gap.alignment, gap.predicted_log_odds_gain) != length_norm


def test_the_error_of_the_predicted_gain_is_that_of_two_means(generator):
    batch, model = random_batch(generator), zoo.build(dtype=torch.float64)
    direction = {name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()}
    gap = measured(batch, model, advantages=torch.ones(18), direction=direction)
    gradients = zoo.oracle(model, batch)
    slopes = sum(gradients[name] @ value.reshape(-1) for name, value in direction.items())
    correct, first = batch.rollouts.correct, torch.arange(18) < 6
    variance = sum(slopes[first & (correct == which)].var() / 3 for which in (True, False))
    assert gap.predicted_log_odds_gain_stderr[0].item() == pytest.approx(variance.sqrt().item(), rel=1e-9)
    assert "first order" in repr(gap)
    summary = gap.summary()
    assert summary["rlvr/model/alignment"] == pytest.approx(gap.alignment.mean().item())
    assert not [key for key in summary if "min" in key or "max" in key]


# -- self-influence ---------------------------------------------------------------------------------------------------


def brute_force(gradients, weights, correct, prompt_of, prompt, noise):
    """Δμ̂ and the in-sample figure by their definitions; ``noise`` [2] stands in for a class of one."""
    own = [i for i in range(len(gradients)) if prompt_of[i] == prompt]
    classes = {which: [i for i in own if bool(correct[i]) == which] for which in (True, False)}
    gap = gradients[classes[True]].mean(0) - gradients[classes[False]].mean(0)
    alignment = sum(weights[i] * (gradients[i] @ gap) for i in range(len(gradients)) if i not in own)
    for i in own:
        for which, sign in ((True, 1), (False, -1)):
            others = [j for j in classes[which] if j != i]
            if others:
                alignment += sign * weights[i] * (gradients[i] @ gradients[others].mean(0))
            else:
                alignment += sign * weights[i] * (gradients[i] @ gradients[i] - noise[int(which)])
    return alignment, (weights @ gradients) @ gap


def noises(gradients, correct, prompt_of, prompt):
    """[incorrect, correct]: trace of the covariance; pooled over the other prompts for a class of one."""
    traces = []
    for which in (False, True):
        own = gradients[(correct == which) & (prompt_of == prompt)]
        if len(own) > 1:
            traces.append(own.var(0).sum())
            continue
        rest = [gradients[(correct == which) & (prompt_of == p)] for p in prompt_of.unique() if p != prompt]
        rest = [r for r in rest if len(r) > 1]
        traces.append(sum(r.var(0).sum() * (len(r) - 1) for r in rest) / sum(len(r) - 1 for r in rest))
    return traces


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_step_alignment_is_its_definition(scope, length_norm, generator):
    """Any weights, classes of 3 + 3, 2 + 4 and 5 + 1 responses; the jackknife by leaving responses out for real."""
    batch, model = random_batch(generator), zoo.build(dtype=torch.float64, tied=True)
    gap = measured(batch, model, advantages=torch.ones(18), length_norm=length_norm)
    weights = torch.randn(18, generator=generator)
    found = gap.step_alignment(weights, scope=scope)
    scores = torch.cat(list(zoo.oracle(model, batch).values()), 1)
    lengths = batch.rollouts.lengths.double() if length_norm else torch.ones(18).double()
    gradients, weights = scores / lengths[:, None], weights.double() * lengths
    correct, prompt_of = batch.rollouts.correct, batch.rollouts.prompt_index
    allowed = 1e-10 * gradients.square().sum(1).max() * weights.abs().sum()
    for p in range(3):
        mine = weights if scope == "batch" else weights * (prompt_of == p)
        noise = noises(gradients, correct, prompt_of, p)
        alignment, in_sample = brute_force(gradients, mine, correct, prompt_of, p, noise)
        assert (found.alignment[p] - alignment).abs() < allowed
        assert (found.alignment_in_sample[p] - in_sample).abs() < allowed
        strata = [((correct == which) & (prompt_of == p)).nonzero().flatten().tolist() for which in (False, True)]
        if min(map(len, strata)) == 1:
            assert found.stderr[p].isnan()
            continue
        variance = 0.0
        for stratum in strata:
            replicates = []
            for i in stratum:
                keep, scaled = torch.arange(18) != i, mine.clone()
                scaled[stratum] *= len(stratum) / (len(stratum) - 1)
                replicates.append(brute_force(gradients[keep], scaled[keep], correct[keep], prompt_of[keep], p,
                                              noise)[0])
            replicates = torch.stack(replicates)
            variance += (len(stratum) - 1) / len(stratum) * (replicates - replicates.mean()).square().sum()
        assert found.stderr[p].item() == pytest.approx(variance.sqrt().item(), rel=1e-8)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_the_error_of_the_mean_comes_from_leaving_prompts_out(scope, generator):
    batch, model = zoo.sample(generator, 4, 4, correct=[1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0]), zoo.build()
    gap = measured(batch, model.double(), advantages=torch.ones(16))
    weights, prompt_of = torch.randn(16, generator=generator).double(), batch.rollouts.prompt_index
    gradients = torch.cat(list(zoo.oracle(model, batch, True).values()), 1)
    scaled = weights * batch.rollouts.lengths
    means = []
    for left_out in range(4) if scope == "batch" else (0, 2, 3):
        keep = prompt_of != left_out
        values = []
        for p in {0, 2, 3} - {left_out}:  # all answers to prompt 1 are right: it takes part in D alone
            part = scaled[keep] * 4 / 3 if scope == "batch" else scaled[keep] * (prompt_of[keep] == p)
            values.append(brute_force(gradients[keep], part, batch.rollouts.correct[keep], prompt_of[keep], p, [])[0])
        means.append(torch.stack(values).mean())
    means = torch.stack(means)
    variance = (len(means) - 1) / len(means) * (means - means.mean()).square().sum()
    found = gap.step_alignment(weights, scope=scope)
    assert found.mean_stderr.item() == pytest.approx(variance.sqrt().item(), rel=1e-8)
    assert found.summary()["rlvr/model/step_alignment_stderr"] == found.mean_stderr.item()


def test_by_default_the_step_is_that_of_sgd_on_the_loss(generator):
    """In sample, against the update that SGD proposes, measured as a direction in a second pass."""
    batch, model = random_batch(generator), zoo.build(dtype=torch.float64)
    advantages = rf.advantages(batch.rollouts, "grpo")
    gap = measured(batch, model, advantages=advantages)
    update = rf.propose(torch.optim.SGD(model.parameters(), lr=0.3))
    again = measured(batch, model, advantages=advantages, direction=update, method="segmented")
    found = gap.step_alignment(learning_rate=0.3)
    assert torch.allclose(found.alignment_in_sample, again.alignment, rtol=1e-9)
    assert (found.self_influence > 0).all()
    own = again.step_alignment(learning_rate=0.3, scope="prompt")  # what is taken off needs no other prompt
    assert torch.allclose(own.self_influence, found.self_influence, rtol=1e-8)
    assert found.summary()["rlvr/model/step_alignment"] == pytest.approx(found.alignment.mean().item())
    assert "scope=batch, prompts=3" in repr(found)


def test_along_the_gap_itself_it_is_the_unbiased_squared_norm(generator):
    """D = κ (ĝ⁺ − ĝ⁻), which every GRPO-like estimator makes of a prompt; classes of one included."""
    batch, model = random_batch(generator), zoo.build(dtype=torch.float64)
    gap = measured(batch, model, advantages=torch.ones(18), method="ghost", length_norm=False)
    advantages = rf.advantages(batch.rollouts, "dr_grpo").double() / 6
    found = gap.step_alignment(advantages, scope="prompt")
    kappa = rf.kappa(gap.success_rate, 6, "dr_grpo")
    assert gap.pooled.tolist() == [False, False, True]
    assert torch.allclose(found.alignment, kappa * gap.norm_sq, rtol=1e-6)  # advantages are float32
    assert torch.allclose(found.alignment_in_sample, kappa * gap.norm_sq_naive, rtol=1e-6)


def test_prompts_of_one_class_have_no_step_alignment(generator):
    batch = zoo.sample(generator, 4, 2, correct=[1, 0, 1, 0, 1, 1, 1, 1])
    gap = measured(batch, zoo.build(dtype=torch.float64), advantages=rf.advantages(batch.rollouts, "dr_grpo"))
    found = gap.step_alignment()
    assert found.alignment.isfinite().tolist() == found.stderr.isfinite().tolist() == [True, False]
    with pytest.raises(ValueError, match="weights must be 0 for the responses of prompts that were not measured"):
        gap.step_alignment(torch.ones(8))


def test_a_step_that_is_not_known_is_refused(generator):
    batch, model = zoo.sample(generator), zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, torch.ones(8), probe=probe)
    gap = probe.gap()
    with pytest.raises(ValueError, match="scope must be 'prompt' for method 'segmented'"):
        gap.step_alignment(torch.ones(8))
    with pytest.raises(ValueError, match="weights must be given where gradients came from a probe"):
        gap.step_alignment(scope="prompt")
    for weights, error in ((torch.ones(7), ValueError), (torch.full((8,), torch.nan), ValueError),
                           (torch.ones(8, dtype=torch.int64), TypeError), ([1.0] * 8, TypeError)):
        with pytest.raises(error, match="weights must"):
            gap.step_alignment(weights, scope="prompt")


# -- unbiasedness, where the truth can be enumerated ------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed_form() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [S], verdicts [S] and scores [S, K] of all responses of a softmax policy with 3 tokens."""
    generator = torch.Generator().manual_seed(5)
    policy = TabularPolicy.random(3, 3, 2, generator)
    correct = torch.rand(len(policy.responses), generator=generator) < 0.5
    weight = policy.weight.clone().requires_grad_()
    logp = policy.log_probability(policy.hidden, weight, policy.bias)
    scores = torch.stack([torch.autograd.grad(value, weight, retain_graph=True)[0].flatten() for value in logp])
    return policy.probability(), correct, scores


def sampled(closed_form, n_prompts, group_size, generator):
    """A result of method "sketch" whose sketches are the exact scores of responses sampled to ``n_prompts`` prompts."""
    probability, correct, scores = closed_form
    drawn = torch.multinomial(probability, n_prompts * group_size, replacement=True, generator=generator)
    n = len(drawn)
    rollouts = Rollouts.from_packed(torch.zeros(n, dtype=torch.int64), torch.arange(n + 1), correct[drawn].float(),
                                    group_size=group_size)
    rewards = rollouts.rewards.view(-1, group_size)
    mixed = (rewards != rewards[:, :1]).any(1).repeat_interleave(group_size)
    coefficients = torch.where(mixed, -rf.advantages(rollouts, "dr_grpo").double(), 0.0)
    gap = result.build(rollouts, method="sketch", source="training", length_norm=False, coefficients=coefficients,
                       coverage=Coverage(("weight",), {}, {}), grams=None, dots={}, direction=False,
                       sketches={"weight": coefficients[:, None] * scores[drawn]})
    return rollouts, gap


def expected_alignment(closed_form, rollouts):
    """[P]: ⟨E[D | verdicts], g⁺ − g⁻⟩ with D over each prompt alone, and over the batch; weights = advantages."""
    probability, correct, scores = closed_form
    mean = [(probability * (correct == which)) @ scores / probability[correct == which].sum()
            for which in (False, True)]
    gap, advantages = mean[1] - mean[0], rf.advantages(rollouts, "dr_grpo").double()
    per_response = advantages * torch.where(rollouts.correct, mean[1] @ gap, mean[0] @ gap)
    per_prompt = torch.zeros(rollouts.n_prompts, dtype=torch.float64).index_add(0, rollouts.prompt_index, per_response)
    return per_prompt, per_prompt.sum()


def test_the_policy_is_what_it_should_be(closed_form):
    probability, correct, scores = closed_form
    assert probability.sum().item() == pytest.approx(1.0)
    assert (probability @ scores).abs().max() < 1e-12  # E[score] = 0
    assert 0.2 < probability[correct].sum() < 0.8


def test_a_prompts_own_step_is_judged_without_bias(closed_form, generator):
    """1500 groups of 6: the mean error within 4 of its standard errors, the in-sample one beyond 10; and the jackknife
    variance is 1 to 2 times the true one (conservative, as that of a squared norm)."""
    rollouts, gap = sampled(closed_form, 1500, 6, generator)
    found, truth = gap.step_alignment(scope="prompt"), expected_alignment(closed_form, rollouts)[0]
    usable = found.alignment.isfinite()
    error = (found.alignment - truth)[usable]
    naive = (found.alignment_in_sample - truth)[usable]
    assert usable.sum() > 1000
    assert error.mean().abs() < 4 * error.std() / len(error)**0.5
    assert naive.mean() > 10 * naive.std() / len(naive)**0.5
    several = found.stderr.isfinite()
    assert 1.0 < found.stderr[several].square().mean() / (found.alignment - truth)[several].square().mean() < 2.0


def test_a_batchs_step_is_judged_without_bias(closed_form, generator):
    """300 batches of 4 groups of 5, all prompts of one policy; a prompt of one class adds nothing to D. The mean error
    within 4 of its standard errors, the in-sample one beyond 6; the claimed variance of the mean is the true one within
    30 % (its own standard error is below 10 %)."""
    errors, naive, means, claimed = [], [], [], []
    for _ in range(300):
        rollouts, gap = sampled(closed_form, 4, 5, generator)
        found, truth = gap.step_alignment(), expected_alignment(closed_form, rollouts)[1]
        usable = found.alignment.isfinite()
        errors.append((found.alignment - truth)[usable].mean())
        means.append(found.alignment[usable].mean())
        claimed.append(found.mean_stderr.square())
        naive.append((found.alignment_in_sample - truth)[usable].mean())
    errors, naive, means, claimed = (x[x.isfinite()] for x in map(torch.stack, (errors, naive, means, claimed)))
    assert len(errors) > 250  # the rest have no class of two to take the noise of a class of one from
    assert errors.mean().abs() < 4 * errors.std() / len(errors)**0.5
    assert naive.mean() > 6 * naive.std() / len(naive)**0.5
    assert 0.7 < claimed.mean() / means.var() < 1.3


# -- who costs whom ---------------------------------------------------------------------------------------------------


def test_conflicts_are_cosines_with_unbiased_norms(generator):
    batch, model = random_batch(generator), zoo.build(7, dtype=torch.float64)  # all three squared norms above 0
    gap = measured(batch, model, advantages=torch.ones(18))
    conflicts = gap.conflicts(z=1e-6)
    expected = gap.interference() / (gap.norm_sq[:, None] * gap.norm_sq).sqrt()
    assert torch.allclose(conflicts.cosine, expected)
    assert gap.conflicts(z=100.0).cosine.isnan().all()
    gradients = torch.cat(list(zoo.oracle(model, batch, True).values()), 1)
    correct, prompt = batch.rollouts.correct, batch.rollouts.prompt_index
    norms = ref.gap_norm_sq(gradients[correct & (prompt == 0)], gradients[~correct & (prompt == 0)])
    assert conflicts.products[0, 0].item() == pytest.approx(norms.item(), rel=1e-9)
    with pytest.raises(ValueError, match="z must be positive"):
        gap.conflicts(z=0.0)


def test_the_worst_pairs_and_the_figures_of_a_batch():
    gaps = torch.tensor([[1.0, 0.0], [-2.0, 0.1], [0.0, 3.0], [0.0, 0.01]], dtype=torch.float64)
    seen = Interference(gaps @ gaps.T, torch.tensor([True, True, True, False]), ("a", "b", "c", "noise"))
    (worst,) = seen.worst()
    assert worst[:2] == ("a", "b")
    assert worst.product == pytest.approx(-2.0)
    assert worst.cosine == pytest.approx(-2 / 4.01**0.5)
    figures = seen.summary()
    assert figures["rlvr/model/conflict_frac_comparable"] == 0.5  # 3 of 6 pairs
    assert figures["rlvr/model/conflict_frac"] == pytest.approx(1 / 3)
    assert figures["rlvr/model/conflict_cosine_worst"] == worst.cosine
    assert not [key for key in figures if "min" in key or "max" in key]
    assert "a and b: cosine -0.99" in repr(seen)
    none = Interference(gaps @ gaps.T, torch.zeros(4, dtype=torch.bool), ("a", "b", "c", "d"))
    assert none.worst() == ()
    assert none.summary()["rlvr/model/conflict_cosine_mean"] != none.summary()["rlvr/model/conflict_cosine_mean"]
    assert "opposed=nan%" in repr(none)
    assert copy.deepcopy(none).summary()["rlvr/model/conflict_frac_comparable"] == 0.0
