"""A small decoder-only transformer, with a cache of keys and values for sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, H, T, D / H] of the tokens seen so far, one pair per block."""


def repeat_cache(cache: Cache, times: int) -> Cache:
    """The cache of B prompts for ``times`` continuations of each."""
    return [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in cache]


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind an RMSNorm."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
                ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Also returns the keys and values, which are the ``past`` of the tokens to come."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        allowed = None
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        attended = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)))), (k, v)


class Policy(nn.Module):
    """Token ids [B, T] -> final hidden states [B, T, D]; ``lm_head.weight`` [V, D] turns those into logits."""

    def __init__(self, vocabulary_size: int, max_length: int, *, width: int = 64, n_heads: int = 4, n_layers: int = 2):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.final_norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.with_cache(tokens, None)[0]

    def with_cache(self, tokens: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
        """Also returns the cache for the tokens that follow; ``tokens`` [B, T] follow those of ``cache``."""
        seen = 0 if cache is None else cache[0][0].shape[2]
        x = self.token_embedding(tokens) + self.position_embedding.weight[seen:seen + tokens.shape[1]]
        extended = []
        for i, block in enumerate(self.blocks):
            x, keys_and_values = block(x, None if cache is None else cache[i])
            extended.append(keys_and_values)
        return self.final_norm(x), extended
