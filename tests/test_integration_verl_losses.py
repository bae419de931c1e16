"""verl's policy losses registered as "rlvr:...": the same losses, reporting more."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("verl.trainer", reason="needs verl: pip install verl")

import verl
from verl.trainer.ppo import core_algos
from verl.utils.metric import Metric
from verl.workers.utils.losses import ppo_loss
from verl_steps import SUM_KEYS, LossInputs, actor, run

from rlvr_fast.integrations import verl as integration

STOCK = tuple(name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("rlvr:"))


@pytest.fixture(autouse=True)
def installed():
    """The hooks of this version, and verl as it was afterwards."""
    registry = dict(core_algos.POLICY_LOSS_REGISTRY)
    integration.install()
    yield
    core_algos.POLICY_LOSS_REGISTRY.clear()
    core_algos.POLICY_LOSS_REGISTRY.update(registry)


def test_verl_has_the_losses_that_were_tested():
    assert set(STOCK) == {"vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean",
                          "dro", "cispo", "bypass_mode"}
    assert {f"rlvr:{name}" for name in STOCK} <= core_algos.POLICY_LOSS_REGISTRY.keys()
    assert "rlvr:rlvr:vanilla" not in core_algos.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", STOCK)
def test_value_gradient_metrics_and_random_numbers_are_those_of_the_stock_loss(name, aggregation, corrected):
    """Corrected: with importance weights; bypass_mode computes its own, and rejects tokens."""
    weights, correction = None, None
    if corrected and name == "bypass_mode":
        correction = {"loss_type": "reinforce", "rollout_rs": "token_k1", "rollout_rs_threshold": "0.7_1.3"}
    elif corrected:
        weights = torch.rand(LossInputs.sample().log_prob.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    config = actor(name, loss_agg_mode=aggregation, correction=correction)
    loss, metrics, gradient, state = run(name, LossInputs.sample(), config, weights)
    own_loss, own_metrics, own_gradient, own_state = run(f"rlvr:{name}", LossInputs.sample(), config, weights)
    assert torch.equal(own_loss, loss)
    assert torch.equal(own_gradient, gradient)
    assert gradient.abs().sum() > 0
    assert torch.equal(own_state, state)
    assert {key: value for key, value in own_metrics.items() if key not in SUM_KEYS} == metrics
    assert own_metrics.keys() - metrics.keys() == SUM_KEYS


@pytest.mark.parametrize("name", STOCK)
def test_with_entropy_and_kl_verls_ppo_loss_gives_the_same_gradient(name):
    """The whole way: jagged log-probs, padding, the policy loss, both terms of the configuration."""
    found = []
    for mode in (name, f"rlvr:{name}"):
        torch.manual_seed(0)
        output, data = LossInputs.sample().jagged()
        loss, metrics = ppo_loss(actor(mode, use_kl_loss=True, entropy_coeff=0.01), output, data)
        loss.backward()
        found.append((loss, output["leaf"].grad, metrics))
    (loss, gradient, metrics), (own_loss, own_gradient, own_metrics) = found
    assert torch.equal(own_loss, loss)
    assert torch.equal(own_gradient, gradient)
    assert gradient.abs().sum() > 0
    assert own_metrics.keys() - metrics.keys() == SUM_KEYS
    assert all(isinstance(own_metrics[key], Metric) for key in SUM_KEYS)


def test_a_loss_registered_later_is_found_when_it_is_asked_for():
    """By verl's own ``ppo_loss``; and a name that is registered anew means the new loss."""
    def twice(**arguments):
        loss, metrics = core_algos.compute_policy_loss_vanilla(**arguments)
        return 2 * loss, metrics

    core_algos.register_policy_loss("later")(twice)
    output, data = LossInputs.sample().jagged()
    own, _ = ppo_loss(actor("rlvr:later"), output, data)
    single, _ = ppo_loss(actor("rlvr:vanilla"), *LossInputs.sample().jagged())
    assert own == 2 * single
    core_algos.register_policy_loss("vanilla")(twice)
    again, _ = ppo_loss(actor("rlvr:vanilla"), *LossInputs.sample().jagged())
    assert again == own
    with pytest.raises(ValueError, match="Unsupported loss mode: rlvr:nonsense"):
        core_algos.get_policy_loss_fn("rlvr:nonsense")


def test_a_loss_that_cannot_be_measured_trains_on_and_is_warned_of_once(caplog):
    """Every micro-batch still has all keys: verl wants the same from every rank."""
    def odd(**arguments):
        return core_algos.compute_policy_loss_vanilla(**arguments)

    core_algos.register_policy_loss("odd")(odd)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, metrics, gradient, _ = run("rlvr:odd", LossInputs.sample(), actor("odd"))
    assert torch.equal(gradient, run("vanilla", LossInputs.sample(), actor("vanilla"))[2])
    assert {metrics[key] for key in SUM_KEYS} == {0.0}
    said = [record.getMessage() for record in caplog.records if "rlvr_fast" in record.getMessage()]
    assert len(said) == 1
    assert "no metrics of the update by loss 'odd', training goes on without: KeyError: 'old_log_prob'" in said[0]
    assert f"verl {verl.__version__}; tested with 0.9.1" in said[0]


@pytest.mark.parametrize(("module", "name"), [(core_algos, "get_policy_loss_fn"), (core_algos, "POLICY_LOSS_REGISTRY")])
def test_a_verl_without_what_is_hooked_is_named_and_the_other_hooks_are_placed(module, name, monkeypatch, caplog):
    from verl.trainer.ppo import metric_utils

    kept = metric_utils.compute_data_metrics
    monkeypatch.delattr(module, name)
    monkeypatch.setattr(metric_utils, "compute_data_metrics", kept.__wrapped__)
    with caplog.at_level(logging.WARNING):
        integration.install()
    said = [record.getMessage() for record in caplog.records if "rlvr_fast" in record.getMessage()]
    assert len(said) == 1
    assert "no policy losses rlvr:..., training goes on without: AttributeError" in said[0]
    assert name in said[0]
    assert "verl 0.9.1" in said[0]
    assert metric_utils.compute_data_metrics is not kept.__wrapped__
    monkeypatch.undo()
