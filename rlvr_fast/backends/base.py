"""What every backend returns for the head pass, whichever hardware produced it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenPass(NamedTuple):
    """Per-token results of one pass over the vocabulary, each [N] float32.

    ``off_mass`` is the probability of everything but the sampled token, summed without it. It is carried because
    ``1 - p`` has no digits left once the sampled token is nearly certain, and most tokens of a trained policy are.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    sum_p_sq: torch.Tensor
    score_sq: torch.Tensor
    off_mass: torch.Tensor
