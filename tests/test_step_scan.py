"""scan_step: the measured curve, its break-even and verdict, and that parameters always come back bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import SignPolicy

from rlvr_fast import Rollouts
from rlvr_fast.step.scan import crossing, scan_step


class SignModel:
    """The closed-form policy with its θ as a parameter, on given rollouts."""

    def __init__(self, policy: SignPolicy, rollouts: Rollouts):
        self.policy, self.rollouts = policy, rollouts
        self.theta = torch.nn.Parameter(torch.tensor([policy.theta], dtype=torch.float64))
        self.calls = 0

    def logp(self):
        self.calls += 1
        sign = 2.0 * self.rollouts.tokens - 1
        return torch.nn.functional.logsigmoid(2 * sign * self.theta)

    def scan(self, fraction, **options):
        """Scan an update that covers ``fraction`` of the way to break-even."""
        update = torch.full_like(self.theta.detach(), self.policy.direction * fraction * self.policy.break_even)
        return scan_step(self.logp, [self.theta], [update], self.rollouts, **({"in_sample": False} | options))


def sampled_model(theta=0.3, n_prompts=128, group_size=16):
    policy = SignPolicy(4, 0, theta)
    return SignModel(policy, policy.sample(n_prompts, group_size, torch.Generator().manual_seed(0)))


# -- the curve --------------------------------------------------------------------------------------------------------


def test_an_update_may_be_a_dict_that_has_every_parameter():
    model = sampled_model(n_prompts=4)
    other = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    delta = torch.full_like(model.theta.detach(), 0.05)
    listed = scan_step(model.logp, [model.theta], [delta], model.rollouts, in_sample=False)
    by_name = scan_step(model.logp, [model.theta], {other: torch.ones(2), model.theta: delta}, model.rollouts,
                        in_sample=False)
    assert torch.equal(listed.success, by_name.success)
    with pytest.raises(ValueError, match=r"every parameter, got none for parameters\[1\]"):
        scan_step(model.logp, [model.theta, other], {model.theta: delta}, model.rollouts, in_sample=False)


def test_curve_and_break_even_are_exact_on_a_sample_that_is_the_policy():
    policy, rollouts = SignPolicy.exact_sample(5, 1, n_prompts=2)
    multiples = tuple(0.25 * k for k in range(1, 9))
    curve = SignModel(policy, rollouts).scan(0.7, multiples=multiples)
    for row, multiple in enumerate(multiples):
        moved = policy.moved(multiple * 0.7 * policy.break_even)
        expected = moved.log_odds() - policy.log_odds()
        torch.testing.assert_close(curve.log_odds_gain[row], torch.full((2,), expected, dtype=torch.float64), rtol=1e-9,
                                   atol=1e-9)
    # The curve is no parabola: between scanned points 0.175 of a break-even apart interpolation is 0.6 % long.
    torch.testing.assert_close(curve.break_even, torch.full((2,), 1 / 0.7, dtype=torch.float64), rtol=1e-2, atol=0)
    assert curve.success_break_even.item() == pytest.approx(1 / 0.7, rel=1e-2)
    assert curve.success_before.item() == pytest.approx(policy.success_rate())


def test_shapes_and_agreement_with_the_single_measure():
    curve = sampled_model(n_prompts=6).scan(0.2)
    assert curve.multiples == (0.5, 1.0, 2.0, 4.0)
    for name in ("log_odds_gain", "stderr", "ess"):
        assert getattr(curve, name).shape == (4, 6)
    for name in ("success", "success_stderr", "success_gain", "success_gain_stderr", "ess_fraction", "mean_ratio"):
        assert getattr(curve, name).shape == (4,)
    assert curve.break_even.shape == (6,)
    assert curve.success_break_even.ndim == 0
    torch.testing.assert_close(curve.success - curve.success_before, curve.success_gain)
    assert torch.equal(curve.stderr[2], curve.measures[2].stderr)


def test_crossing_is_exact_for_parabolas_through_the_origin():
    multiples = (0.5, 1, 2, 4)
    m = torch.tensor(multiples, dtype=torch.float64)[:, None]
    break_even = torch.tensor([0.6, 1.0, 1.9, 3.99], dtype=torch.float64)
    torch.testing.assert_close(crossing(multiples, m * (break_even - m)), break_even, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gains", "expected"), [
    ([1, 2, 3], math.inf), ([-1, 2, 3], 0.0), ([-1, -2, -3], 0.0), ([1, -1, 5], 5 / 3), ([1, 0, -1], 2.0),
    ([0, 0, 0], math.inf), ([1, math.nan, -1], math.nan),
])
def test_crossing_at_the_edges(gains, expected):
    """Multiples 1, 2, 4. In the fourth case gain/multiple falls from 1 to −1/2: zero two thirds of the way to 2."""
    found = crossing((1, 2, 4), torch.tensor(gains, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, nan_ok=True)


def test_crossing_of_one_multiple_and_of_no_prompts():
    assert crossing((2.0,), torch.tensor([1.0])).item() == math.inf
    assert crossing((2.0,), torch.tensor([-1.0])).item() == 0
    assert crossing((1.0, 2.0), torch.zeros(2, 0)).shape == (0,)


def test_a_prompt_without_both_classes_has_no_break_even():
    policy = SignPolicy(4, 0, 0.3)
    tokens = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    rollouts = Rollouts.from_padded(tokens, None, torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=2)
    curve = SignModel(policy, rollouts).scan(0.3)
    assert curve.break_even.isnan().tolist() == [False, True]


# -- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "verdict"), [
    (0.1, "safe"), (0.4, "safe"), (0.8, "near"), (1.0, "undetermined"), (1.2, "overshoot"), (1.5, "overshoot"),
])
def test_verdict_against_the_known_break_even(fraction, verdict):
    assert sampled_model().scan(fraction).verdict == verdict


@pytest.mark.parametrize(("theta", "fraction"), [(0.6, 1.0), (0.9, 0.8), (0.9, 1.3)])
def test_no_verdict_where_the_rollouts_do_not_reach(theta, fraction):
    curve = sampled_model(theta).scan(fraction, ess_floor=0.3)
    assert curve.ess_fraction[1] < 0.3
    assert curve.verdict == "undetermined"


def test_no_verdict_from_a_handful_of_responses_or_one_prompt():
    handful = sampled_model(n_prompts=2, group_size=4).scan(0.1, z=1e-9)
    assert (handful.success_gain != 0).all()
    assert handful.verdict == "undetermined"
    assert sampled_model(n_prompts=1, group_size=2000).scan(0.1).verdict == "undetermined"


@pytest.mark.parametrize(("options", "reason"), [
    ({"fraction": 1.0}, "within error"), ({"fraction": 0.1, "multiples": (0.5, 2)}, "not scanned"),
    ({"fraction": 0.1, "ess_floor": 0.999}, "sample gone"), ({"fraction": 0.1, "class_floor": 1e6}, "scarce class"),
    ({"fraction": 0.1, "in_sample": True}, "in-sample"), ({"fraction": 0.1}, ""), ({"fraction": 1.2}, ""),
    ({"fraction": 0.1, "z": 1000}, "within error"),
])
def test_an_undetermined_verdict_has_its_reason(options, reason):
    curve = sampled_model().scan(**options)
    assert curve.reason == reason
    assert (curve.verdict == "undetermined") == (reason != "")
    assert f"undetermined ({reason})" in repr(curve) or not reason


def test_few_prompts_and_a_foreign_sampler_are_reasons_of_their_own():
    assert sampled_model(n_prompts=1, group_size=2000).scan(0.1).reason == "few prompts"
    model = sampled_model()
    assert model.scan(0.1, logp_before=model.logp().detach() - 0.25).reason == "mean ratio"


def test_reach_ends_where_the_sample_the_scarcer_class_or_the_mean_ratio_does():
    model = sampled_model()
    assert model.scan(0.1).reach == 4.0
    curve = model.scan(0.8, multiples=(0.25, 0.5, 1, 2, 4))
    shares, last = dict(zip(curve.multiples, curve.ess_fraction.tolist(), strict=True)), curve.reach
    assert last in (1.0, 2.0)
    assert shares[last] >= 0.1 > shares[2 * last]  # here it is the effective sample that ends
    scarcer = float(curve.measures[1].ess_scarcer)
    assert model.scan(0.8, class_floor=scarcer * 0.999, multiples=(0.25, 0.5)).reach == 0.5
    assert model.scan(0.8, class_floor=scarcer * 1.001, multiples=(0.25, 0.5)).reach in (0.0, 0.25)
    assert model.scan(0.1, logp_before=model.logp().detach() - 0.25).reach == 0  # mean ratio e


def test_a_loss_that_a_handful_of_failures_hides_is_not_called_safe():
    """J = 0.996 and a step of 1.2 break-evens: without the floor some draws call it safe or near, with it none."""
    policy, said = SignPolicy(16, 10, 0.12), {0: [], 30: []}
    for seed in range(12):
        model = SignModel(policy, policy.sample(32, 32, torch.Generator().manual_seed(seed)))
        for floor, verdicts in said.items():
            verdicts.append(model.scan(1.2, class_floor=floor).verdict)
    assert {"safe", "near"} & set(said[0])
    assert set(said[30]) <= {"undetermined", "overshoot"}


def test_in_sample_gains_prove_nothing_but_in_sample_losses_do():
    assert sampled_model().scan(0.1, in_sample=True).verdict == "undetermined"
    assert sampled_model().scan(1.2, in_sample=True).verdict == "overshoot"


def test_no_verdict_when_logp_before_is_another_policy():
    """Ratios that are all e times too large: the effective sample looks healthy, the mean ratio does not."""
    model = sampled_model()
    curve = model.scan(0.1, logp_before=model.logp().detach() - 0.25)
    assert (curve.ess_fraction > 0.5).all()
    assert (curve.mean_ratio > 2).all()
    assert curve.verdict == "undetermined"


def test_thresholds_move_the_verdict():
    model = sampled_model()
    assert model.scan(0.4, margin=3).verdict == "near"  # 4 x 0.4 is past break-even
    assert model.scan(0.4, multiples=(0.5, 1)).verdict == "near"  # nothing scanned beyond
    assert model.scan(0.1, z=1000).verdict == "undetermined"
    assert model.scan(0.1, multiples=(0.5, 2)).verdict == "undetermined"  # 1 not scanned
    assert model.scan(0.1, ess_floor=0.999).verdict == "undetermined"


# -- the parameters come back -----------------------------------------------------------------------------------------


def awkward_parameters():
    """Values that θ + mΔ − mΔ would not restore, in several dtypes and layouts."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator).bfloat16(),
              torch.randn(4, 6, generator=generator).t(), torch.tensor([1e30, -0.0, 1e-40, 0.1]),
              torch.randn((), generator=generator, dtype=torch.float64)]
    return [torch.nn.Parameter(value) for value in values]


def bits(tensors):
    return [(t.detach().contiguous().reshape(-1).view(torch.uint8).tolist(), t.data_ptr(), t.stride(), t.requires_grad)
            for t in tensors]


@pytest.mark.parametrize("failing_call", [None, 1, 2, 3, 4])
def test_parameters_are_restored_bitwise_even_when_logp_fn_fails(failing_call):
    rollouts = sampled_model(n_prompts=2).rollouts
    parameters = awkward_parameters()
    update = [torch.full_like(p.detach(), 0.3, dtype=torch.float32) for p in parameters]
    before, calls, seen = bits(parameters), 0, []

    def logp_fn():
        nonlocal calls
        calls += 1
        seen.append(parameters[0][0, 0].item())
        if calls == failing_call:
            raise RuntimeError("out of memory")
        return torch.full((rollouts.n_tokens,), -1.0)

    def scan():
        return scan_step(logp_fn, iter(parameters), update, rollouts, multiples=(0.5, 1, 2))

    if failing_call is None:
        scan()
        assert seen == pytest.approx([seen[0] + 0.3 * m for m in (0, 0.5, 1, 2)])
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            scan()
    assert bits(parameters) == before


@pytest.mark.parametrize("bad", [lambda n: torch.full((n,), math.nan), lambda n: torch.zeros(n + 1), lambda n: None])
def test_parameters_are_restored_when_logp_fn_returns_rubbish(bad):
    model = sampled_model(n_prompts=2)
    before = bits([model.theta])
    with pytest.raises((ValueError, TypeError), match="logp"):
        scan_step(lambda: bad(model.rollouts.n_tokens), [model.theta], [torch.ones(1)], model.rollouts,
                  logp_before=model.logp())
    assert bits([model.theta]) == before


def test_logp_fn_runs_without_gradients_once_per_multiple():
    model = sampled_model(n_prompts=2)
    model.scan(0.1)
    assert model.calls == 5
    model.scan(0.1, logp_before=model.logp(), multiples=(1,))
    assert model.calls == 7
    grads = []

    def logp_fn():
        grads.append(torch.is_grad_enabled())
        return model.logp()
    scan_step(logp_fn, [model.theta], [torch.ones(1)], model.rollouts)
    assert grads == [False] * 5


def test_a_reused_output_buffer_is_no_trap():
    """A captured graph returns the same tensor every time; multiple 0 must not be overwritten by the others."""
    model = sampled_model(n_prompts=8)
    expected = model.scan(0.2).success_gain
    buffer = torch.empty(model.rollouts.n_tokens, dtype=torch.float64)
    compute, model.logp = model.logp, lambda: buffer.copy_(compute())
    assert torch.equal(model.scan(0.2).success_gain, expected)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_summary_and_repr():
    curve = sampled_model().scan(0.8)
    summary = curve.summary()
    assert all(isinstance(value, float) for value in summary.values())
    assert all(name.startswith("rlvr/step/") and "min" not in name and "max" not in name for name in summary)
    assert summary["rlvr/step/scan/success_gain/x0.5"] == curve.success_gain[0].item()
    assert summary["rlvr/step/scan/break_even"] == curve.success_break_even.item()
    text = repr(curve)
    assert text.startswith("StepCurve(128 prompts, verdict near")
    assert len([line for line in text.splitlines() if "±" in line]) == 5  # the head and four multiples


def test_warnings_name_the_multiples_they_concern():
    curve = sampled_model().scan(0.8, in_sample=True)
    assert [warning.startswith("in-sample") for warning in curve.warnings].count(True) == 1
    gone = [warning for warning in curve.warnings if "effective sample size gone" in warning]
    assert {warning[:5] for warning in gone} == {"at 2:", "at 4:"}


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"multiples": ()}, ValueError, "multiples must be strictly increasing and not empty"),
    ({"multiples": (1, 0.5)}, ValueError, "strictly increasing"),
    ({"multiples": (1, 1)}, ValueError, "strictly increasing"),
    ({"multiples": (0, 1)}, ValueError, "multiples must be positive"),
    ({"multiples": (-1, 1)}, ValueError, "multiples must be positive"),
    ({"multiples": (1, math.inf)}, ValueError, "multiples must be finite"),
    ({"multiples": 2}, TypeError, "multiples must be a sequence"),
    ({"multiples": "12"}, TypeError, "multiples must be a sequence"),
    ({"update": []}, ValueError, "same number of tensors"),
    ({"parameters": [], "update": []}, ValueError, "at least one"),
    ({"update": [torch.ones(2)]}, ValueError, r"update\[0\] must have shape \[1\]"),
    ({"update": [[1.0]]}, TypeError, r"update\[0\] must be a torch.Tensor"),
    ({"update": torch.ones(1)}, TypeError, "update must be a sequence of tensors"),
    ({"update": [torch.ones(1, dtype=torch.int64)]}, TypeError, r"update\[0\] must be floating point"),
    ({"update": [torch.tensor([math.nan])]}, ValueError, r"update\[0\] must be finite"),
    ({"update": [torch.ones(1, device="meta")]}, ValueError, r"update\[0\] must be on cpu"),
    ({"parameters": [torch.ones(1, dtype=torch.int64)]}, TypeError, r"parameters\[0\] must be floating point"),
    ({"logp_fn": 3}, TypeError, "logp_fn must be callable"),
    ({"z": 0}, ValueError, "z must be positive"),
    ({"margin": 0.5}, ValueError, "margin must be at least 1"),
    ({"ess_floor": 1.5}, ValueError, "ess_floor must be in"),
    ({"class_floor": -1}, ValueError, "class_floor must be at least 0"),
    ({"class_floor": math.nan}, ValueError, "class_floor must be finite"),
    ({"in_sample": 1}, TypeError, "in_sample must be"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"rollouts": None}, TypeError, "rollouts must be Rollouts"),
    ({"logp_before": torch.zeros(3)}, ValueError, "logp_before must start with"),
])
def test_refuses(change, error, message):
    model = sampled_model(n_prompts=2)
    arguments = {"logp_fn": model.logp, "parameters": [model.theta], "update": [torch.ones(1)],
                 "rollouts": model.rollouts} | change
    before = bits([model.theta])
    with pytest.raises(error, match=message):
        scan_step(**arguments)
    assert bits([model.theta]) == before


def test_refuses_a_parameter_given_twice():
    model = sampled_model(n_prompts=2)
    with pytest.raises(ValueError, match="distinct"):
        scan_step(model.logp, [model.theta, model.theta], [torch.ones(1)] * 2, model.rollouts)
