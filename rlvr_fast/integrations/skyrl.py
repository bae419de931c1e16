"""Gradient-gap metrics in the logs of SkyRL 0.3.0: ``RayPPOTrainer(..., callbacks=[GapCallback()])``.

By the time that SkyRL calls ``on_step_end`` it has dropped rewards and uids from the batch and folded the loss
reduction into the advantages. So the callback looks at what ``compute_advantages_and_returns`` of this one trainer
returns, on the driver and before any of that, and returns it as it is.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from skyrl.train.utils.callbacks import TrainingCallback

from rlvr_fast.integrations import packed
from rlvr_fast.monitor import GapMonitor

if TYPE_CHECKING:
    from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
    from skyrl.train.trainer import RayPPOTrainer
    from skyrl.train.utils.callbacks import CallbackInput, TrainingControl

CENTRED = ("grpo", "rloo", "maxrl")  # advantages that a group's own mean was taken off
FIELDS = ("rewards", "loss_mask", "response_mask", "advantages")


class GapCallback(TrainingCallback):
    """Adds ``rlvr/...``, tiers 0 and 1 of ``rlvr_fast.monitor.METRICS``, to what SkyRL logs for every step.

    Step-wise trajectories count as one response each. With ``use_kl_in_reward`` the rewards hold the penalty: give the
    monitor a threshold.

    Args:
        monitor: None: ``GapMonitor()``, for rewards of 0 and 1.

    Raises:
        TypeError: if ``monitor`` is none. TypeError, ValueError: in training, from the first step on; see ``update``.
    """

    def __init__(self, monitor: GapMonitor | None = None) -> None:
        if not isinstance(monitor, GapMonitor | None):
            raise TypeError(f"monitor must be a GapMonitor or None, got {type(monitor).__name__}")
        self.monitor = GapMonitor() if monitor is None else monitor
        self._trainer: RayPPOTrainer | None = None
        self._found: dict[str, float] = {}

    def on_step_start(self, trainer: RayPPOTrainer, callback_input: CallbackInput, control: TrainingControl) -> None:
        if trainer is self._trainer:
            return
        original = trainer.compute_advantages_and_returns

        @functools.wraps(original)
        def watched(data: TrainingInputBatch) -> TrainingInputBatch:
            batch = original(data)
            algorithm = trainer.cfg.trainer.algorithm
            update(self.monitor, batch, with_advantages=algorithm.advantage_estimator in CENTRED)
            return batch

        trainer.compute_advantages_and_returns, self._trainer = watched, trainer

    def on_step_end(self, trainer: RayPPOTrainer, callback_input: CallbackInput, control: TrainingControl) -> None:
        self._found = self.monitor.compute()
        self.monitor.reset()

    def on_log(self, trainer: RayPPOTrainer, callback_input: CallbackInput, control: TrainingControl) -> None:
        callback_input.logs.update(self._found)
        self._found = {}  # evaluation before training logs too


def update(monitor: GapMonitor, batch: TrainingInputBatch, *, with_advantages: bool = True) -> None:
    """Give ``monitor`` a driver's batch, as ``compute_advantages_and_returns`` returns it.

    Args:
        with_advantages: whether the group's own mean was taken off its advantages, which then tell
            ``rlvr/gap/kappa``; False for gae and reinforce++.

    Raises:
        TypeError: naming what ``batch`` lacks. ValueError: from ``GapMonitor.update``.
    """
    if not monitor.due:
        return
    metadata = getattr(batch, "metadata", None) or {}
    missing = [name for name in FIELDS if not isinstance(batch, dict) or batch.get(name) is None]
    missing += [] if "uids" in metadata else ["metadata['uids']"]
    if missing:
        raise TypeError("batch must be a TrainingInputBatch as compute_advantages_and_returns of SkyRL 0.3.0 returns "
                        f"it, got {type(batch).__name__} without {', '.join(missing)}")
    n, width = batch["loss_mask"].shape
    n -= metadata.get("pad_size", 0)  # rows that fill up the last rank
    last = [i for i, ends in enumerate(metadata.get("is_last_step") or [True] * n) if ends and i < n]
    logp, sampler = batch.get("action_log_probs"), batch.get("rollout_logprobs")
    tokens = {"logp": sampler, "old_logp": None} if logp is None else {"logp": logp, "old_logp": sampler}
    data: dict[str, Any] = {name: value[:n] for name, value in tokens.items() if value is not None}
    data["rewards"] = batch["rewards"].sum(1)[last]
    if with_advantages and not bool(data["rewards"].isnan().any()):
        response = batch["response_mask"].bool()
        mean = torch.where(response, batch["advantages"], 0.0).sum(1) / response.sum(1).clamp(min=1)
        data["advantages"] = mean[last]
    packed.update(monitor, mask=batch["loss_mask"][:n], cu_seqlens=[0, *((i + 1) * width for i in last)],
                  prompt_ids=[metadata["uids"][i] for i in last], **data)
