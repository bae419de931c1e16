"""Metrics beside any per-sample loss of prime-rl 0.8.0, one line in a module that ``trainer.loss.import_path`` names.

    stock = prime_rl.trainer.rl.loss.setup_rl_loss_fn(config)          # or a loss of one's own
    loss = with_gap_metrics(stock)                                     # import_path = "my_module.loss"

A loss sees one sample and no group, and prime-rl logs the mean of each metric over all samples and ranks. So these are
numerators and denominators, whose means are to be divided.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

LOSS_INPUTS = ("trainer_logprobs", "advantages", "loss_mask")


def with_gap_metrics(loss: Callable[..., Any], *, centred: bool = True) -> Callable[..., Any]:
    """The same loss with more in its ``metrics``. Nothing of what trains is touched, and nothing synchronises.

    With m, c, k, l the logged means of the keys, and w that of ``rlvr/sample/with_loss``:

        rlvr/sample/mixed          m / w is rlvr/group/frac_mixed
        rlvr/sample/correct        c / m is rlvr/group/p_mixed
        rlvr/sample/kappa          k / w is rlvr/gap/kappa
        rlvr/sample/logp_contrast  l / m is rlvr/logp/gap [derived]: sign(A) · mean logp / share of its class, 1 − |A|

    Exact where rewards are 0 or 1, groups are of one size and no sample of a group is filtered out.

    Args:
        loss: ``loss(inputs, **kwargs) -> outputs``: LossInputs in, LossOutputs out.
        centred: advantages are r − mean, as those of prime-rl's grpo. False, as for any other estimator, leaves
            logp_contrast out.

    Raises:
        TypeError: in training, from the first sample on, for inputs or outputs of another shape.
    """
    @functools.wraps(loss)
    def measured(inputs: Any, **kwargs: Any) -> Any:
        missing = [name for name in LOSS_INPUTS if not hasattr(inputs, name)]
        if missing:
            raise TypeError(f"inputs must be LossInputs as in prime-rl 0.8.0, got {type(inputs).__name__} without "
                            f"{', '.join(missing)}")
        outputs = loss(inputs, **kwargs)
        metrics = getattr(outputs, "metrics", None)
        if not isinstance(metrics, dict) or not dataclasses.is_dataclass(outputs) or isinstance(outputs, type):
            raise TypeError("loss must return LossOutputs as in prime-rl 0.8.0, with a dict of metrics; got "
                            f"{type(outputs).__name__}")
        return dataclasses.replace(outputs, metrics=metrics | _metrics(inputs, centred))

    return measured


@torch.no_grad()
def _metrics(inputs: Any, centred: bool) -> dict[str, torch.Tensor]:
    mask: torch.Tensor = inputs.loss_mask.bool()
    count = mask.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values.detach().float(), 0.0).sum() / count.clamp(min=1)

    advantage = mean(inputs.advantages)
    found = {"with_loss": (count > 0).float(), "mixed": (advantage != 0).float(), "correct": (advantage > 0).float(),
             "kappa": advantage.abs() / 2}
    if centred:
        share = 1 - advantage.abs()
        contrast = advantage.sign() * mean(inputs.trainer_logprobs) / share
        found["logp_contrast"] = torch.where(share > 0, contrast, 0.0)
    return {f"rlvr/sample/{name}": value for name, value in found.items()}
