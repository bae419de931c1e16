"""Gradient-gap metrics in the logs of verl: for every step what the driver's batch tells, no line changed anywhere.

The driver of verl holds the whole step: scores, advantages, log-probs of trainer and sampler, and (but for the V1
trainer) the prompts' uids. It calls ``compute_data_metrics`` on it once per step and logs the result. ``install`` adds
the ``rlvr/...`` metrics of tiers 0 to 2 to that result. Nothing that trains is touched, and where they cannot be had
the reason is logged once, as a warning. Installed as an entry point of the group "verl.plugins", the package does so by
itself wherever verl is imported; VERL_USE_EXTERNAL_PLUGINS=none keeps it out.

``gap_metrics`` is the same for drivers of one's own.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch

from rlvr_fast.monitor import GapMonitor

if TYPE_CHECKING:
    from verl import DataProto

logger = logging.getLogger(__name__)


def gap_metrics(batch: DataProto, *, threshold: float | None = None, estimator: str | None = None) -> dict[str, float]:
    """Tiers 0 to 2 of ``rlvr_fast.monitor.METRICS`` for a driver's batch.

    Args:
        batch: with response_mask and token_level_scores (or rm_scores) [B, T] in ``batch.batch``. Where they are there
            it uses old_log_probs, rollout_log_probs (``rlvr/ratio/...`` is then trainer over sampler) and
            sum_pi_squared, all [B, T], and uid in ``batch.non_tensor_batch``.
        threshold: responses with at least this sum of scores are the correct ones. None: scores take at most two
            values, and the larger one is correct; a single value must be 0 or 1.
        estimator: what made the batch's advantages, by its name in ``rf.advantages`` ("grpo", "dr_grpo", "rloo", ...).
            Its advantages then give ``rlvr/gap/kappa``, the share of the update's power that pushes down, and without
            uid which groups were mixed. None: they are not looked at.

    Raises:
        ValueError: for scores of more values without a threshold.
    """
    tensors, present = batch.batch, set(batch.batch.keys())
    mask = tensors["response_mask"].bool()
    scores = tensors["token_level_scores" if "token_level_scores" in present else "rm_scores"]
    data: dict[str, Any] = {"correct": _correct(scores.double().sum(1), threshold), "mask": mask}
    if "uid" in batch.non_tensor_batch:
        data["prompt_ids"] = [str(identity) for identity in batch.non_tensor_batch["uid"]]
    if estimator is not None:  # outcome advantages: the same on every token of a response
        data["advantages"] = (tensors["advantages"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    if "old_log_probs" in present:
        optional = {"logp": "old_log_probs", "old_logp": "rollout_log_probs", "sum_p_sq": "sum_pi_squared"}
        data |= {ours: tensors[theirs].float() for ours, theirs in optional.items() if theirs in present}
    monitor = GapMonitor(estimator=estimator or "grpo", budget=None, decay=None)
    monitor.update(**data)
    return monitor.compute()


def _correct(scores: torch.Tensor, threshold: float | None) -> torch.Tensor:
    if threshold is not None:
        return scores >= threshold
    values = scores.unique()
    if len(values) > 2 or (len(values) == 1 and values[0] not in (0.0, 1.0)):
        raise ValueError(f"threshold must say which scores are correct: they are not of two values, got "
                         f"{len(values)} between {values[0]:g} and {values[-1]:g}")
    return scores == (values[1] if len(values) == 2 else 1.0)


def install(*, threshold: float | None = None, estimator: str | None = None) -> None:
    """Have verl's driver log these metrics. Calling it again changes its arguments.

    Args:
        threshold, estimator: see ``gap_metrics``; to set them, call this in a module of one's own, which
            VERL_USE_EXTERNAL_MODULES names.
    """
    from verl.trainer.ppo import metric_utils

    stock = getattr(metric_utils.compute_data_metrics, "__wrapped__", metric_utils.compute_data_metrics)
    given_up: list[str] = []

    @functools.wraps(stock)
    def compute_data_metrics(batch: DataProto, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = stock(batch, *args, **kwargs)
        try:
            metrics |= gap_metrics(batch, threshold=threshold, estimator=estimator)
        except Exception as error:  # a monitor must not end a run
            if not given_up:
                logger.warning("rlvr_fast: no gradient-gap metrics: %s: %s", type(error).__name__, error)
            given_up.append(str(error))
        return metrics

    # Trainers that were imported before hold the function by name.
    for name, module in list(sys.modules.items()):
        own = getattr(module, "compute_data_metrics", None) if name.startswith("verl.") else None
        if own is not None and getattr(own, "__wrapped__", own) is stock:
            module.compute_data_metrics = compute_data_metrics
