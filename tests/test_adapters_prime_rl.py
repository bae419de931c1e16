"""A per-sample loss with metrics beside it, as prime-rl's trainer calls it.

prime-rl is no package on PyPI: its LossInputs, LossOutputs and the way its trainer joins metrics (a stack per key,
whose mean is logged) are stand-ins here, with the names of its release 0.8.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from adapter_packs import Pack, centred_step
from monitor_ranks import Step, monitor

from rlvr_fast.integrations.prime_rl import with_gap_metrics


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def stock(inputs: LossInputs, *, clip: float = 10.0) -> LossOutputs:
    """A policy gradient with an importance ratio."""
    ratio = (inputs.trainer_logprobs - inputs.inference_logprobs)[inputs.loss_mask].exp().clamp(max=clip)
    return LossOutputs(-(ratio * inputs.advantages[inputs.loss_mask]).sum(), {"ratio": ratio.mean().detach()})


def samples(pack: Pack) -> list[LossInputs]:
    tensors = {name: pack.split(name) for name in ("logp", "old_logp", "advantages", "mask")}
    return [LossInputs(logp.clone().requires_grad_(), old, None, advantages, mask)
            for logp, old, advantages, mask in zip(*tensors.values(), strict=True)]


@pytest.fixture
def step() -> Step:
    return centred_step()


@pytest.fixture
def pack(step) -> Pack:
    return Pack.of(step, list(range(len(step.prompt_ids))))


def logged(pack: Pack, **options) -> dict[str, float]:
    """Means over samples."""
    found = [with_gap_metrics(stock, **options)(inputs).metrics for inputs in samples(pack)]
    return {key: float(torch.stack([one[key] for one in found]).mean()) for key in found[0]}


def test_loss_gradient_and_own_metrics_are_bitwise_those_of_the_stock_loss(pack):
    for plain, wrapped in zip(samples(pack), samples(pack), strict=True):
        expected, found = stock(plain, clip=1.05), with_gap_metrics(stock)(wrapped, clip=1.05)
        expected.loss.backward()
        found.loss.backward()
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(wrapped.trainer_logprobs.grad, plain.trainer_logprobs.grad)
        assert found.metrics["ratio"] == expected.metrics["ratio"]
        assert isinstance(found, LossOutputs)
        assert all(value.ndim == 0 and not value.requires_grad for value in found.metrics.values())


def test_quotients_of_logged_means_are_the_monitors_metrics(pack, step):
    own = monitor(estimator="dr_grpo")
    own.update(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp,
               advantages=step.advantages)
    known, found = own.compute(), logged(pack)
    mean = {key.removeprefix("rlvr/sample/"): value for key, value in found.items()}
    assert mean["mixed"] / mean["with_loss"] == pytest.approx(known["rlvr/group/frac_mixed"])
    assert mean["correct"] / mean["mixed"] == pytest.approx(known["rlvr/group/p_mixed"])
    assert mean["kappa"] / mean["with_loss"] == pytest.approx(known["rlvr/gap/kappa"], rel=1e-5)
    assert mean["logp_contrast"] / mean["mixed"] == pytest.approx(known["rlvr/logp/gap"], rel=1e-4)


def test_a_sample_without_loss_tokens_adds_to_no_numerator_or_denominator():
    empty = LossInputs(torch.full((4,), torch.nan), torch.zeros(4), None, torch.ones(4), torch.zeros(4).bool())
    found = with_gap_metrics(lambda inputs: LossOutputs(inputs.advantages.sum() * 0))(empty).metrics
    assert all(float(value) == 0 for value in found.values())


def test_other_estimators_get_no_contrast(pack):
    assert "rlvr/sample/logp_contrast" not in logged(pack, centred=False)
    normalised = LossInputs(-torch.ones(2), torch.zeros(2), None, torch.full((2,), 1.7), torch.ones(2).bool())
    assert float(with_gap_metrics(stock)(normalised).metrics["rlvr/sample/logp_contrast"]) == 0  # no share above 1


def test_every_sample_has_the_same_keys_and_none_is_taken_for_an_extreme(pack):
    """Ranks gather key by key, and loggers reduce by these letters."""
    found = [set(with_gap_metrics(stock)(inputs).metrics) for inputs in samples(pack)]
    assert all(keys == found[0] for keys in found)
    assert not any("min" in key or "max" in key for key in found[0] - {"ratio"})


def test_other_inputs_and_outputs_are_refused_by_name():
    with pytest.raises(TypeError, match=r"LossInputs as in prime-rl 0.8.0, got dict without trainer_logprobs, "
                                        "advantages, loss_mask"):
        with_gap_metrics(stock)({})
    inputs = LossInputs(torch.zeros(1), torch.zeros(1), None, torch.zeros(1), torch.ones(1).bool())
    with pytest.raises(TypeError, match=r"LossOutputs as in prime-rl 0.8.0, with a dict of metrics; got tuple"):
        with_gap_metrics(lambda inputs: (torch.zeros(()), {}))(inputs)
