"""OpenRLHF with gradient-gap metrics in its logs: launches ``openrlhf.cli.train_ppo_ray`` with the same arguments.

    python examples/openrlhf_experience.py --actor.model_name_or_path Qwen/Qwen2.5-1.5B-Instruct ...

OpenRLHF 0.11.2 has no callbacks. Its driver makes all Experiences of a step, sums them up in ``_compute_rollout_stats``
and logs the result; a subclass adds ``rlvr/...`` to that. Losses and weights stay the same.
"""

from __future__ import annotations

import runpy
from typing import Any

from rlvr_fast import GapMonitor
from rlvr_fast.integrations.openrlhf import CENTRED, gap_metrics


def with_gap(trainer_class: type) -> type:
    """The trainer class, whose rollout statistics hold the gap's metrics, too."""

    class GapTrainer(trainer_class):
        gap_monitor: GapMonitor | None = None

        def _compute_rollout_stats(self, experiences: list[Any]) -> dict[str, float]:
            self.gap_monitor = self.gap_monitor or GapMonitor()  # rewards of 0 and 1; else give it a threshold
            return super()._compute_rollout_stats(experiences) | gap_metrics(
                self.gap_monitor, experiences, group_size=self.args.rollout.n_samples_per_prompt,
                with_advantages=self.args.algo.advantage.estimator in CENTRED)

    return GapTrainer


def main() -> None:
    import ray
    from openrlhf.trainer import ppo_trainer

    stock = ppo_trainer.PPOTrainer.__ray_metadata__.modified_class  # what ray.remote was given
    ppo_trainer.PPOTrainer = ray.remote(with_gap(stock))
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
