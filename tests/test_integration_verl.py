"""The metrics of ``rlvr_fast.integrations.verl`` on a real DataProto, in what verl's driver logs."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from monitor_ranks import Step

pytest.importorskip("verl.trainer", reason="needs verl: pip install verl")

from verl import DataProto
from verl.trainer.ppo import core_algos, metric_utils

from rlvr_fast.integrations import verl as integration
from rlvr_fast.monitor import METRICS, GapMonitor


@pytest.fixture
def step() -> Step:
    step = Step.sample(0)
    step.mask[:, 0] = True
    return step


def batch_of(step: Step, *, uid: bool = True, scores: tuple[float, float] = (0.0, 1.0)) -> DataProto:
    """As the driver holds it: the score on the last token, advantages of verl's own GRPO."""
    low, high = scores
    rewards = torch.zeros(step.mask.shape)
    rewards[torch.arange(len(rewards)), step.mask.sum(1) - 1] = torch.where(step.correct, high, low)
    advantages, returns = core_algos.compute_grpo_outcome_advantage(rewards, step.mask.float(),
                                                                    np.array(step.prompt_ids, dtype=object))
    tensors = {"response_mask": step.mask.long(), "token_level_scores": rewards, "token_level_rewards": rewards,
               "advantages": advantages, "returns": returns, "old_log_probs": step.logp.float(),
               "rollout_log_probs": step.old_logp.float(), "sum_pi_squared": step.sum_p_sq.float(),
               "responses": step.ids, "prompts": step.ids,
               "attention_mask": torch.cat([step.mask, step.mask], 1).long()}
    others = {"uid": np.array(step.prompt_ids, dtype=object)} if uid else {}
    return DataProto.from_dict(tensors=tensors, non_tensors=others)


def without_time(found: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.startswith("rlvr/") and "/time/" not in key}


def test_a_drivers_batch_gives_what_the_same_tensors_give_a_monitor(step):
    batch = batch_of(step)
    monitor = GapMonitor(budget=None, decay=None)
    monitor.update(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp.float(),
                   old_logp=step.old_logp.float(), sum_p_sq=step.sum_p_sq.float(),
                   advantages=batch.batch["advantages"][:, 0])
    expected = without_time(monitor.compute())
    assert without_time(integration.gap_metrics(batch, estimator="grpo")) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert {"rlvr/group/frac_mixed", "rlvr/ratio/ess", "rlvr/token/energy_pos", "rlvr/gap/kappa"} <= expected.keys()


def test_rewards_of_plus_and_minus_one_are_verdicts_too(step):
    found = integration.gap_metrics(batch_of(step, scores=(-1.0, 1.0)))
    expected = integration.gap_metrics(batch_of(step))
    assert found["rlvr/group/p_mean"] == expected["rlvr/group/p_mean"]
    assert found["rlvr/logp/gap"] == expected["rlvr/logp/gap"]


def test_without_uids_groups_are_known_from_advantages(step):
    """The V1 trainer's batch has none."""
    found = integration.gap_metrics(batch_of(step, uid=False), estimator="grpo")
    expected = integration.gap_metrics(batch_of(step))
    for key in ("rlvr/group/frac_mixed", "rlvr/group/frac_solved", "rlvr/group/p_mean"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)
    assert "rlvr/logp/gap" not in found  # class means need the group's size, too


def test_what_the_v1_trainer_hands_out_is_enough_for_tier_0(step):
    """The fields of its _compute_metrics: no uid, no log-probs."""
    batch = batch_of(step, uid=False)
    fields = ("prompts", "responses", "response_mask", "advantages", "returns", "token_level_scores")
    found = integration.gap_metrics(batch.select(batch_keys=list(fields)), estimator="grpo")
    tiers = {metric.key: metric.tier for metric in METRICS}
    assert {tiers[key] for key in without_time(found)} == {0}
    assert {"rlvr/group/p_mean", "rlvr/group/frac_mixed", "rlvr/gap/kappa", "rlvr/length/mean"} <= found.keys()


def test_advantages_of_an_unknown_estimator_are_not_looked_at(step):
    """REINFORCE++ whitens over the batch: none is 0 in a group of one class."""
    found = integration.gap_metrics(batch_of(step, uid=False))
    assert not {"rlvr/group/frac_mixed", "rlvr/gap/kappa", "rlvr/token/power_neg_share"} & found.keys()
    assert found["rlvr/group/p_mean"] == pytest.approx(float(step.correct.double().mean()), rel=1e-9)


@pytest.fixture
def stock():
    """verl's function, put back afterwards."""
    original = metric_utils.compute_data_metrics
    yield getattr(original, "__wrapped__", original)
    metric_utils.compute_data_metrics = original


def test_installed_they_are_in_what_the_driver_logs_beside_its_own(step, stock):
    integration.install()
    integration.install()  # again changes nothing
    batch = batch_of(step)
    found, own = metric_utils.compute_data_metrics(batch=batch, use_critic=False), stock(batch, use_critic=False)
    assert without_time(found) == pytest.approx(without_time(integration.gap_metrics(batch)))
    assert {key: found[key] for key in own} == own
    assert metric_utils.compute_data_metrics.__wrapped__ is stock


def test_a_trainer_imported_earlier_gets_them_too(step, stock):
    module = type(sys)("verl.stand_in_for_a_trainer")
    module.compute_data_metrics = stock
    sys.modules[module.__name__] = module
    try:
        integration.install()
        assert without_time(module.compute_data_metrics(batch=batch_of(step), use_critic=False))
    finally:
        del sys.modules[module.__name__]


def test_graded_scores_are_warned_of_once_and_do_not_end_the_run(step, stock, caplog):
    integration.install()
    batch = batch_of(step)
    batch.batch["token_level_scores"][int(step.correct.nonzero()[0]), 0] += 0.3
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not without_time(metric_utils.compute_data_metrics(batch=batch, use_critic=False))
    said = [record.message for record in caplog.records if "rlvr_fast" in record.message]
    assert len(said) == 1
    assert "threshold must say which scores are correct: they are not of two values, got 3 between 0 and 1.3" in said[0]
    integration.install(threshold=0.5)
    assert without_time(metric_utils.compute_data_metrics(batch=batch, use_critic=False))


def test_importing_the_plugin_installs(stock):
    metric_utils.compute_data_metrics = stock
    assert not integration.installed()
    plugin = importlib.import_module("rlvr_fast.integrations.verl_plugin")
    importlib.reload(plugin)
    assert integration.installed()
    assert "rlvr:vanilla" in core_algos.POLICY_LOSS_REGISTRY


def test_the_plugin_keeps_the_arguments_of_an_earlier_install(step, stock):
    """verl imports VERL_USE_EXTERNAL_MODULES first, plug-ins after."""
    integration.install(threshold=0.5)
    importlib.reload(importlib.import_module("rlvr_fast.integrations.verl_plugin"))
    batch = batch_of(step)
    batch.batch["token_level_scores"][int(step.correct.nonzero()[0]), 0] += 0.3
    assert without_time(metric_utils.compute_data_metrics(batch=batch, use_critic=False))


def test_a_plugin_that_cannot_be_loaded_says_so_and_lets_verl_go_on(monkeypatch, caplog):
    """verl mentions what a plug-in raises in its debug log only."""
    plugin = importlib.import_module("rlvr_fast.integrations.verl_plugin")
    monkeypatch.setitem(sys.modules, "rlvr_fast.integrations.verl", None)
    with caplog.at_level(logging.WARNING):
        importlib.reload(plugin)
    assert "rlvr_fast: its verl plug-in cannot be loaded, training goes on without: ModuleNotFoundError" in caplog.text
    assert "rlvr-fast doctor" in caplog.text


PROBE = """
import sys; sys.path[:0] = [{path!r}]
import verl
from verl.trainer.ppo import ray_trainer as driver
from verl.workers.utils.losses import get_policy_loss_fn
print(get_policy_loss_fn("rlvr:vanilla").__module__, driver.compute_data_metrics.__wrapped__.__module__,
      driver.reduce_metrics.__wrapped__.__module__)
from verl.workers.engine import EngineRegistry
print(*(EngineRegistry.get_engine_cls(model, "fsdp2").__module__ for model in ("language_model", "value_model")))
"""


def test_verl_loads_the_plugin_on_import_and_workers_and_driver_have_it(tmp_path):
    """Through a distribution that declares the entry point, as the package's own does once installed; and the engine
    that two variables select, for language models alone."""
    meta = tmp_path / "rlvr_fast_plugin_test-1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: rlvr-fast-plugin-test\nVersion: 1\n")
    (meta / "entry_points.txt").write_text("[verl.plugins]\nrlvr_fast_test = rlvr_fast.integrations.verl_plugin\n")
    path = {"PYTHONPATH": ":".join(filter(None, sys.path)), "VERL_USE_EXTERNAL_PLUGINS": "rlvr_fast_test",
            "VERL_USE_EXTERNAL_MODULES": "rlvr_fast.integrations.verl_engine", "VERL_ENGINE_VENDOR": "rlvr_fast",
            "VERL_ENGINE_DEVICE": "cuda"}
    said = subprocess.run([sys.executable, "-c", PROBE.format(path=str(tmp_path))], capture_output=True, text=True,
                          check=False, env=os.environ | path, timeout=280)
    assert said.stdout.split()[-5:-2] == ["verl.trainer.ppo.core_algos", "verl.trainer.ppo.metric_utils",
                                          "verl.utils.metric.utils"], said.stderr
    assert said.stdout.split()[-2:] == ["rlvr_fast.integrations.verl_engine",
                                        "verl.workers.engine.fsdp.transformer_impl"]
