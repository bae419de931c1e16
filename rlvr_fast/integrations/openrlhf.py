"""Gradient-gap metrics from the Experiences of OpenRLHF 0.11.2, on its driver or in its actors.

OpenRLHF has no callbacks: ``gap_metrics`` is one line in ``_compute_rollout_stats`` of a trainer's subclass, where each
Experience of the step and the order of prompts are at hand; examples/openrlhf_experience.py is the launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.monitor import GapMonitor

if TYPE_CHECKING:
    from openrlhf.trainer.ppo_utils import Experience

CENTRED = ("group_norm", "rloo", "dr_grpo")  # names of --algo.advantage.estimator whose baseline is the group's mean
FIELDS = ("action_mask", "action_log_probs", "rollout_log_probs", "advantages", "rewards", "scores", "index", "info")


def gap_metrics(monitor: GapMonitor, experiences: Sequence[Experience], *, group_size: int,
                with_advantages: bool = True) -> dict[str, float]:
    """Metrics of a training step, for its ``status``; also put into each Experience's ``info``, which actors log.

    Args:
        monitor: its window is computed and ended.
        experiences: all of the step, as ``make_experience_batch`` returns them.
        group_size: ``args.rollout.n_samples_per_prompt``.
        with_advantages: whether ``args.algo.advantage.estimator`` is one of ``CENTRED``; ``rlvr/gap/kappa`` is there
            then.

    Raises:
        ValueError, TypeError: naming the argument; see ``update``.
    """
    for experience in experiences:
        update(monitor, experience, group_size=group_size, with_advantages=with_advantages)
    found = monitor.compute()
    monitor.reset()
    for experience in experiences:
        n = len(experience.action_mask)
        experience.info.update({key: torch.full((n,), value) for key, value in found.items()})
    return found


def update(monitor: GapMonitor, experience: Experience, *, group_size: int | None = None,
           with_advantages: bool = True) -> None:
    """Give ``monitor`` one Experience: tiers 0 and 1 of ``rlvr_fast.monitor.METRICS``.

    The verdict is ``scores`` where they are given, else ``info["reward"]``, the reward before length penalties, else
    ``rewards``; NaN is no verdict. Log-probs are those of the actor at the step's start, against ``rollout_log_probs``
    where they are given.

    Args:
        group_size: responses per prompt. With it prompts follow from ``index``, which the replay buffer takes away; in
            an actor leave it out, and give group_size and estimator ("grpo" for group_norm) to the monitor instead,
            which recovers groups from advantages.
        with_advantages: see ``gap_metrics``.

    Raises:
        TypeError: for something without the fields of an Experience. ValueError: from ``GapMonitor.update``, and for a
            group_size without ``index``.
    """
    if not monitor.due:
        return
    missing = [name for name in FIELDS if not hasattr(experience, name)]
    if missing:
        raise TypeError(f"experience must be an Experience as in OpenRLHF 0.11.2, got {type(experience).__name__} "
                        f"without {', '.join(missing)}")
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be an int >= 1 or None, got {check.describe(group_size)}")
    if group_size is not None and experience.index is None:
        raise ValueError("group_size needs experience.index, which an Experience of OpenRLHF 0.11.2 has until it "
                         "enters the replay buffer; got None")
    mask = check.tensor("experience.action_mask", experience.action_mask, ndim=2).bool()
    rewards = experience.scores if experience.scores is not None else experience.info.get("reward", experience.rewards)
    data: dict[str, Any] = {"mask": mask, "logp": experience.action_log_probs, "old_logp": experience.rollout_log_probs}
    if rewards is not None:
        data["rewards"] = rewards = check.tensor("experience's scores, info['reward'] or rewards", rewards).reshape(-1)
    if with_advantages and experience.advantages is not None and (rewards is None or not bool(rewards.isnan().any())):
        data["advantages"] = torch.where(mask, experience.advantages, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    if group_size is not None:
        data["prompt_ids"] = [i // group_size for i in experience.index]
    monitor.update(**{name: value for name, value in data.items() if value is not None})
