"""The SkyRL callback: what it adds to a step's log, on SkyRL's own classes where it is installed (0.3.0)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import adapter_skyrl
import pytest
import torch
from adapter_packs import ordered_step
from monitor_ranks import GROUP_SIZE, Step, monitor, without_time

from rlvr_fast.integrations import skyrl as integration

needs_trainer = pytest.mark.skipif(adapter_skyrl.RayPPOTrainer is None, reason="needs SkyRL and all that it needs")


@pytest.fixture
def step() -> Step:
    return ordered_step()


def to_the_right(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Responses end where the row ends."""
    places = torch.arange(mask.shape[1]) >= mask.shape[1] - mask.sum(1, keepdim=True)
    out = torch.zeros(mask.shape, dtype=values.dtype)
    out[places] = values[mask]
    return out


def driver_batch(step: Step, *, pad: int = 0, **changes) -> Any:
    """Before advantages are computed: left padded, the reward on the last token, ``pad`` copies of row 0 at the end."""
    mask = to_the_right(step.mask.float(), step.mask)
    rewards = torch.zeros(mask.shape)
    rewards[:, -1] = step.correct.float()
    tensors = {"response_mask": mask.long(), "loss_mask": mask, "rewards": rewards, "values": None,
               "action_log_probs": to_the_right(step.logp.float(), step.mask),
               "rollout_logprobs": to_the_right(step.old_logp.float(), step.mask)} | changes
    rows = [*range(len(mask)), *[0] * pad]
    padded = {name: None if value is None else value[rows] for name, value in tensors.items()}
    padded["loss_mask"][len(mask):] = 0
    batch = adapter_skyrl.batches.TrainingInputBatch(padded)
    batch.metadata = {"uids": [*step.prompt_ids, *(f"pad{i}" for i in range(pad))], "pad_size": pad,
                      "avg_response_length": 1.0}
    return batch


ALGORITHM = {"advantage_estimator": "grpo", "grpo_norm_by_std": False, "gamma": 1.0, "lambd": 1.0,
             "advantage_batch_normalize": False, "loss_reduction": "token_mean", "max_seq_len": 16}


class Trainer:
    """Fires events and computes advantages with the names of SkyRL's."""

    def __init__(self, callback: integration.GapCallback, **algorithm) -> None:
        self.cfg = SimpleNamespace(trainer=SimpleNamespace(algorithm=SimpleNamespace(**ALGORITHM | algorithm)))
        self._callback_handler = adapter_skyrl.callbacks.CallbackHandler([callback])

    def _fire(self, event: str, **fields) -> None:
        counters = {"global_step": 1, "epoch": 0, "total_steps": 1, "steps_per_epoch": 1}
        getattr(self._callback_handler, event)(
            self, adapter_skyrl.callbacks.CallbackInput(**counters, **fields), SimpleNamespace())

    def compute_advantages_and_returns(self, data: Any) -> Any:
        scores = data["rewards"].sum(1)
        groups = {uid: [i for i, other in enumerate(data.metadata["uids"]) if other == uid]
                  for uid in data.metadata["uids"]}
        mean = torch.stack([scores[groups[uid]].mean() for uid in data.metadata["uids"]])
        data["advantages"] = (scores - mean)[:, None] * data["response_mask"]
        return data

    def normalise(self, data: Any) -> Any:
        """The loss reduction "token_mean" is folded into the advantages."""
        data["advantages"] = data["advantages"] / data["loss_mask"].sum()
        return data


def run_step(trainer: Any, batch: Any) -> dict[str, Any]:
    """What ``train`` does around a step; returns its log."""
    trainer._fire("on_step_start")
    batch = trainer.compute_advantages_and_returns(batch)
    batch.pop("rewards")
    batch.metadata.pop("uids")
    batch.metadata.pop("is_last_step", None)
    trainer.normalise(batch)
    trainer._fire("on_step_end", batch=batch, metrics={})
    logs = {"loss/own": 1.0}
    trainer._fire("on_log", logs=logs)
    return logs


def of_log(logs: dict[str, Any]) -> dict[str, float]:
    return without_time({key: value for key, value in logs.items() if key.startswith("rlvr/")})


def expected(step: Step) -> dict[str, float]:
    own = monitor()
    own.update(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp.float(),
               old_logp=step.old_logp.float(), advantages=step.advantages)
    return without_time(own.compute())


def test_a_steps_log_has_what_its_tensors_give_a_monitor(step):
    logs = run_step(Trainer(integration.GapCallback(monitor())), driver_batch(step))
    assert of_log(logs) == pytest.approx(expected(step), rel=1e-6, abs=1e-9)
    assert {"rlvr/group/frac_solved", "rlvr/ratio/ess", "rlvr/logp/gap", "rlvr/gap/kappa"} <= logs.keys()
    assert logs["loss/own"] == 1.0
    assert not any("min" in key or "max" in key for key in logs)


def test_rows_that_fill_up_ranks_are_no_responses(step):
    logs = run_step(Trainer(integration.GapCallback(monitor())), driver_batch(step, pad=3))
    assert of_log(logs) == pytest.approx(expected(step), rel=1e-6, abs=1e-9)


def test_the_batch_that_trains_is_untouched(step):
    plain, watched = Trainer(integration.GapCallback(monitor())), Trainer(integration.GapCallback(monitor()))
    watched._fire("on_step_start")
    one, other = (trainer.compute_advantages_and_returns(driver_batch(step)) for trainer in (plain, watched))
    assert one.keys() == other.keys()
    assert all(one[key] is other[key] is None or torch.equal(one[key], other[key]) for key in one.keys())  # noqa: SIM118
    assert one.metadata == other.metadata


def test_every_step_is_a_window_and_is_looked_at_once(step):
    trainer = Trainer(integration.GapCallback(monitor(group_size=GROUP_SIZE)))  # refuses prompts with more responses
    for _ in range(3):
        logs = run_step(trainer, driver_batch(step))
    assert of_log(logs) == pytest.approx(expected(step), rel=1e-6, abs=1e-9)
    evaluation: dict[str, Any] = {}
    trainer._fire("on_log", logs=evaluation)
    assert evaluation == {}


def test_in_a_window_that_is_not_measured_nothing_is_logged(step):
    trainer = Trainer(integration.GapCallback(monitor(every=2)))
    found = [bool(of_log(run_step(trainer, driver_batch(step)))) for _ in range(3)]
    assert found == [True, False, True]


def test_steps_of_a_trajectory_are_one_response(step):
    """Two rows each: the reward is on the last one, log-probs and lengths are those of both."""
    n = len(step.prompt_ids)
    twice = step.rows([i for i in range(n) for _ in range(2)])
    batch = driver_batch(twice)
    batch["rewards"][::2] = 0
    batch.metadata["is_last_step"] = [False, True] * n
    batch["advantages"] = step.advantages.float().repeat_interleave(2)[:, None] * batch["response_mask"]
    own = monitor()
    integration.update(own, batch)
    doubled = {name: torch.cat([getattr(step, name)] * 2, 1) for name in ("mask", "logp", "old_logp")}
    joined = Step(**vars(step) | doubled)
    assert without_time(own.compute()) == pytest.approx(expected(joined), rel=1e-6, abs=1e-9)


def test_estimators_with_another_baseline_get_no_kappa(step):
    logs = run_step(Trainer(integration.GapCallback(monitor()), advantage_estimator="gae"), driver_batch(step))
    assert "rlvr/gap/kappa" not in logs
    assert "rlvr/group/frac_mixed" in logs


def test_without_log_probs_of_the_trainer_the_samplers_speak(step):
    logs = run_step(Trainer(integration.GapCallback(monitor())), driver_batch(step, action_log_probs=None))
    assert logs["rlvr/logp/token"] == pytest.approx(float(step.old_logp[step.mask].mean()), rel=1e-6)
    assert "rlvr/ratio/kl" not in logs
    logs = run_step(Trainer(integration.GapCallback(monitor())),
                    driver_batch(step, action_log_probs=None, rollout_logprobs=None))
    assert "rlvr/length/mean" in logs
    assert "rlvr/logp/token" not in logs


def test_hostile_batches(step):
    n = len(step.prompt_ids)
    batch = driver_batch(step)
    batch["rewards"][0, -1] = torch.nan
    found = run_step(Trainer(integration.GapCallback(monitor())), batch)
    assert found["rlvr/group/frac_unscored"] == pytest.approx(1 / n)
    batch = driver_batch(step)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])  # overlong filtering
    found = run_step(Trainer(integration.GapCallback(monitor())), batch)
    assert found["rlvr/length/mean"] == 0
    assert found["rlvr/group/p_mean"] == pytest.approx(float(step.correct.double().mean()))
    batch = driver_batch(step)
    batch.metadata["uids"] = [str(i) for i in range(n)]
    assert run_step(Trainer(integration.GapCallback(monitor())), batch)["rlvr/group/frac_mixed"] == 0


def test_what_is_no_drivers_batch_is_refused_by_name(step):
    with pytest.raises(TypeError, match=r"compute_advantages_and_returns of SkyRL 0.3.0 returns it, got dict without "
                                        r"rewards, loss_mask, response_mask, advantages, metadata\['uids'\]"):
        integration.update(monitor(), {})
    batch = driver_batch(step)
    batch["advantages"] = batch["loss_mask"]
    batch.pop("rewards")  # as at the step's end
    with pytest.raises(TypeError, match="without rewards"):
        integration.update(monitor(), batch)
    with pytest.raises(TypeError, match="monitor must be a GapMonitor or None, got dict"):
        integration.GapCallback({})
    with pytest.raises(ValueError, match="rewards must be 0 or 1"):
        run_step(Trainer(integration.GapCallback(monitor())), driver_batch(step, rewards=torch.ones(step.mask.shape)))


@needs_trainer
@pytest.mark.parametrize(("estimator", "kappa"), [("grpo", True), ("rloo", True), ("reinforce++", False)])
def test_skyrls_own_trainer_computes_advantages_and_logs(step, estimator, kappa):
    """Its methods around a step, on a trainer that never saw a model."""
    stand_in = Trainer(integration.GapCallback(monitor()), advantage_estimator=estimator)
    trainer = object.__new__(adapter_skyrl.RayPPOTrainer)
    trainer.cfg = stand_in.cfg
    trainer.cfg.generator = SimpleNamespace(step_wise_trajectories=False)
    trainer.cfg.trainer.micro_train_batch_size_per_gpu = 1
    trainer._callback_handler, trainer._training_control = stand_in._callback_handler, SimpleNamespace()
    trainer.train_dataloader, trainer.total_training_steps = [1], 1
    trainer.global_step, trainer._current_epoch, trainer.all_metrics = 1, 0, {}
    n = len(step.prompt_ids)
    trainer.normalise = lambda batch: trainer._normalize_advantages(batch, [(0, n)])
    logs = run_step(trainer, driver_batch(step, pad=2))
    known = expected(step)
    scale = GROUP_SIZE / (GROUP_SIZE - 1) if estimator == "rloo" else 1.0
    for key in ("rlvr/group/frac_mixed", "rlvr/group/p_mean", "rlvr/logp/gap", "rlvr/ratio/kl", "rlvr/length/mean"):
        assert logs[key] == pytest.approx(known[key], rel=1e-5)
    assert ("rlvr/gap/kappa" in logs) == kappa
    if kappa:
        assert logs["rlvr/gap/kappa"] == pytest.approx(known["rlvr/gap/kappa"] * scale, rel=1e-5)
