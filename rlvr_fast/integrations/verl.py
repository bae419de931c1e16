"""Gradient-gap metrics in the logs of verl, no line changed anywhere: of the driver's batch, and of the policy loss.

The driver of verl holds the whole step: scores, advantages, log-probs of trainer and sampler, and (but for the V1
trainer) the prompts' uids. It calls ``compute_data_metrics`` on it once per step and logs the result. ``install`` adds
the ``rlvr/...`` metrics of tiers 0 to 2 to that result.

The workers hold the loss. ``install`` registers every policy loss a second time, as "rlvr:vanilla", "rlvr:gspo" and so
on: the same loss, which also reports what it makes of the update. ``policy_loss.loss_mode=rlvr:vanilla`` selects it,
and the driver then logs ``rlvr/update/...`` (``UPDATE_METRICS``).

Nothing that trains is touched, and where metrics cannot be had the reason is logged once, as a warning. Installed as an
entry point of the group "verl.plugins", the package does all this by itself wherever verl is imported;
VERL_USE_EXTERNAL_PLUGINS=none keeps it out.

``gap_metrics`` and ``combine`` are the same for drivers of one's own.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch

from rlvr_fast.integrations import verl_hooks as hooks
from rlvr_fast.integrations.verl_update import UPDATE_METRICS, combine
from rlvr_fast.monitor import GapMonitor

if TYPE_CHECKING:
    from verl import DataProto

__all__ = ["UPDATE_METRICS", "combine", "gap_metrics", "install", "installed"]


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
    """Have verl log these metrics, and register its policy losses as "rlvr:...". Again changes the arguments.

    Losses that are registered after this call are found when ``get_policy_loss_fn`` is asked for "rlvr:<name>"; a name
    that is registered anew means the new loss.

    Args:
        threshold, estimator: see ``gap_metrics``; to set them, call this in a module of one's own, which
            VERL_USE_EXTERNAL_MODULES names.

    Raises:
        ImportError: without verl. What a release of verl does not have is a warning.
    """
    import verl  # noqa: F401

    measure = functools.partial(gap_metrics, threshold=threshold, estimator=estimator)
    for module, what, place in (
            ("verl.trainer.ppo.core_algos", "policy losses rlvr:...", hooks.register_losses),
            ("verl.utils.metric", "rlvr/update/... metrics in the driver's log", hooks.divide_in_reduce_metrics),
            ("verl.trainer.ppo.metric_utils", "gradient-gap metrics in the driver's log",
             functools.partial(hooks.add_to_data_metrics, measure=measure))):
        try:
            place(importlib.import_module(module))
        except Exception as error:  # a monitor must not end a run
            hooks.warn(what, error)


def installed() -> bool:
    """Whether ``install`` was called in this process: verl loads plug-ins after modules of one's own."""
    from verl.trainer.ppo import metric_utils

    return hasattr(getattr(metric_utils, "compute_data_metrics", None), hooks.STOCK)
