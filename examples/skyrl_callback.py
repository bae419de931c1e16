"""SkyRL with gradient-gap metrics in its logs: ``skyrl.train.entrypoints.main_base`` with the same arguments.

    python examples/skyrl_callback.py trainer.algorithm.advantage_estimator=grpo trainer.policy.model.path=...

The callback works on the driver, out of the step's batch; losses and weights stay the same. SkyRL 0.3.0 has callbacks
in RayPPOTrainer, not in its fully asynchronous trainer.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from rlvr_fast import GapMonitor
from rlvr_fast.integrations.skyrl import GapCallback


class GapExperiment(BasePPOExp):
    """The experiment whose trainer has the callback."""

    def get_trainer(self, *args: Any, **kwargs: Any) -> RayPPOTrainer:
        trainer = super().get_trainer(*args, **kwargs)
        trainer.add_callback(GapCallback(GapMonitor()))  # rewards of 0 and 1; else GapMonitor(threshold=...)
        return trainer


@ray.remote(num_cpus=1)
def entrypoint(config: SkyRLTrainConfig) -> None:
    GapExperiment(config).run()


def main() -> None:
    config = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(config)
    initialize_ray(config)
    ray.get(entrypoint.remote(config))


if __name__ == "__main__":
    main()
