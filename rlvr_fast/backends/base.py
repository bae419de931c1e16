"""What every backend returns for the head pass, whichever hardware produced it, and what joins shards of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class TokenPass(NamedTuple):
    """Per-token results of one pass over the vocabulary, each [N] float32.

    ``off_mass`` is the probability of everything but the sampled token, summed without it. It is carried because
    ``1 - p`` has no digits left once the sampled token is nearly certain, and most tokens of a trained policy are.

    Over a shard of the vocabulary, a token that was sampled from another shard (its id is -1) has logp -inf,
    off_mass 1 and score_sq Σ_v (f_v p_v)² with f = dz/draw: nothing is held out.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    sum_p_sq: torch.Tensor
    score_sq: torch.Tensor
    off_mass: torch.Tensor


class Merge(Protocol):
    """Turns the pass of one chunk of tokens over this rank's shard into the pass over the whole vocabulary.

    A collective: every rank must call it equally often, for the same tokens. So a backend cuts its chunks by what all
    ranks share: N, D and ``largest_shard`` in place of its own number of rows.
    """

    @property
    def largest_shard(self) -> int:
        """Rows of the largest shard."""

    def __call__(self, local: TokenPass) -> tuple[TokenPass, torch.Tensor]:
        """(pass over the whole vocabulary, [C] float32 probability of this rank's shard) of a chunk of C tokens."""
