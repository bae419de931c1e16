"""A decoder of the Llama family with random weights, in modules that every provider knows, and the measured shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """A model and a batch: P prompts with n responses each, every sequence of the same length."""

    name: str
    vocabulary: int
    width: int
    n_layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    n_prompts: int = 2
    group_size: int = 8
    prompt_tokens: int = 16
    response_tokens: int = 48

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def __str__(self) -> str:
        return (f"{self.name} (V{self.vocabulary} D{self.width} L{self.n_layers} M{self.intermediate}"
                f"{' tied' if self.tied else ''}), {self.n_prompts}x{self.group_size}x{self.length} tokens")


SHAPES = {
    "tiny": Shape("tiny", 256, 32, 2, 4, 2, 64, False, 2, 4, 3, 5),
    "small": Shape("small", 8192, 384, 4, 6, 6, 1024, False, prompt_tokens=32, response_tokens=96),
    "smollm2": Shape("SmolLM2-135M", 49152, 576, 30, 9, 3, 1536, True),
}


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, kv_width = shape.width, shape.kv_heads * shape.head_size
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.input_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False)
        self.gate_proj = nn.Linear(width, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(width, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.input_norm(x)
        q, k, v = (layer(h).unflatten(-1, (heads, -1)).transpose(-3, -2) for layer, heads in
                   ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads)))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, -3) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(-3, -2).flatten(-2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LanguageModel(nn.Module):
    """[B, T] token ids to [B, T, V] logits. No positions: they have no weights, and cost is all that is asked here."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=shape.width ** -0.5)
        if shape.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
