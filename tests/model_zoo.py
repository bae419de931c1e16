"""Tiny causal language models with the features that per-response gradients trip over, and batches for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlvr_fast import Rollouts

VOCABULARY, WIDTH, PAD = 29, 12, 0


class RMSNorm(nn.Module):
    """As in transformers: a module of its own with a weight."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width) + 0.5), offset

    def forward(self, x):
        return (self.offset + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@dataclass
class Zoo:
    """Features of a model. ``checkpointing``: None, "reentrant", "non-reentrant" or "nested"."""

    tied: bool = False
    bias: bool = True
    norm: str = "rms"
    heads: int = 4
    kv_heads: int = 2
    shared_mlp: bool = False
    lora: bool = False
    checkpointing: str | None = None
    gemma_norm: bool = False
    inplace: bool = False
    functional_head: bool = False


class Lora(nn.Module):
    """A frozen linear layer with a trainable low-rank part, as PEFT wraps one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


class Block(nn.Module):
    def __init__(self, zoo: Zoo, mlp: nn.Module) -> None:
        super().__init__()
        self.zoo, size = zoo, WIDTH // zoo.heads
        norm = nn.LayerNorm if zoo.norm == "layer" else lambda d: RMSNorm(d, float(zoo.gemma_norm))
        self.norm1, self.norm2, self.q_norm = norm(WIDTH), norm(WIDTH), norm(size)
        self.q = nn.Linear(WIDTH, WIDTH, bias=zoo.bias)
        self.k = nn.Linear(WIDTH, size * zoo.kv_heads, bias=zoo.bias)
        self.v = nn.Linear(WIDTH, size * zoo.kv_heads, bias=zoo.bias)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        if zoo.lora:
            self.q, self.v = Lora(self.q), Lora(self.v)
        self.mlp = mlp

    def attention(self, x, visible):
        zoo, (batch, length, _) = self.zoo, x.shape
        q = self.q_norm(self.q(x).view(batch, length, zoo.heads, -1)).transpose(1, 2)
        k, v = (layer(x).view(batch, length, zoo.kv_heads, -1).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (x.repeat_interleave(zoo.heads // zoo.kv_heads, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~visible, -1e9)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x, visible):
        mix = self.attention
        if self.zoo.checkpointing == "nested" and self.training:
            x = x + checkpoint(mix, self.norm1(x), visible, use_reentrant=False)
        else:
            x = x + mix(self.norm1(x), visible)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two blocks; positions enter through a fixed sinusoid, so that packed and padded rows can agree."""

    def __init__(self, zoo: Zoo) -> None:
        super().__init__()
        self.zoo = zoo
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=None)

        def mlp():
            return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH, bias=zoo.bias), nn.ReLU(inplace=True) if zoo.inplace
                                 else nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH, bias=zoo.bias))
        first = mlp()
        self.blocks = nn.ModuleList([Block(zoo, first), Block(zoo, first if zoo.shared_mlp else mlp())])
        self.norm = nn.LayerNorm(WIDTH) if zoo.norm == "layer" else RMSNorm(WIDTH, float(zoo.gemma_norm))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if zoo.tied:
            self.lm_head.weight = self.embed.weight
        if zoo.lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora" in name)

    def forward(self, input_ids, position_ids=None):
        batch, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length)[None].expand(batch, -1)
        sequence = (position_ids == 0).cumsum(1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = (causal & (sequence[:, :, None] == sequence[:, None, :]))[:, None]
        angle = position_ids[..., None] * torch.arange(1, WIDTH + 1) / 7.0
        x = self.embed(input_ids)
        x = x + angle.sin().to(x.dtype)
        if self.zoo.lora and self.zoo.checkpointing:
            x.requires_grad_()
        for block in self.blocks:
            if self.zoo.checkpointing and self.training:
                x = checkpoint(block, x, visible, use_reentrant=self.zoo.checkpointing == "reentrant")
            else:
                x = block(x, visible)
        x = self.norm(x)
        return F.linear(x, self.lm_head.weight) if self.zoo.functional_head else self.lm_head(x)


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **features) -> Model:
    torch.manual_seed(seed)
    model = Model(Zoo(**features))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                scale = 0.9 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.copy_(scale * torch.randn_like(parameter))
    return model.to(dtype)


@dataclass
class Batch:
    """R sequences of prompt + response tokens, padded right: ids, response mask [R, T]."""

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]
    rollouts: Rollouts

    def rows(self, responses) -> Batch:
        """A micro-batch (its rollouts stay those of the whole)."""
        responses = list(responses)
        return Batch(self.ids[responses], self.mask[responses], [self.lengths[i] for i in responses], self.rollouts)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [1, M], position_ids [1, M], response mask [1, M]."""
        keep = torch.arange(self.ids.shape[1])[None] < torch.tensor(self.lengths)[:, None]
        positions = torch.arange(self.ids.shape[1])[None].expand_as(self.ids)
        return self.ids[keep][None], positions[keep][None], self.mask[keep][None]


def sample(generator: torch.Generator, group_size: int = 4, n_prompts: int = 2, longest: int = 7,
           order: list[int] | None = None, correct: list[int] | None = None) -> Batch:
    """Random prompts of 2 to 4 tokens with random responses of 1 to ``longest``; both classes in every prompt."""
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731
    n = n_prompts * group_size
    prompts = [draw(1, VOCABULARY, int(draw(2, 5, 1))) for _ in range(n_prompts)]
    owner = order or [i // group_size for i in range(n)]
    responses = [draw(1, VOCABULARY, int(draw(1, longest + 1, 1))) for _ in range(n)]
    sequences = [torch.cat([prompts[p], response]) for p, response in zip(owner, responses, strict=True)]
    width = max(map(len, sequences)) + 1
    ids = torch.stack([F.pad(s, (0, width - len(s)), value=PAD) for s in sequences])
    position = torch.arange(width)[None]
    starts = torch.tensor([len(prompts[p]) for p in owner])[:, None]
    mask = (position >= starts) & (position < torch.tensor([len(s) for s in sequences])[:, None])
    rewards = torch.tensor(correct or [i % 2 if group_size > 1 else 1 for i in range(n)])
    return Batch(ids, mask, [len(s) for s in sequences], Rollouts.from_padded(ids, mask, rewards, prompt_ids=owner))


def token_logp(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[B, T] log-prob of each token given those before it; 0 for the first."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return F.pad(torch.log_softmax(logits, -1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2), (1, 0))


def oracle(model: nn.Module, batch: Batch, length_norm: bool = False, temperature: float = 1.0
           ) -> dict[str, torch.Tensor]:
    """Per trainable parameter the float64 gradients of every response's log π, one sequence at a time: [R, K]."""
    double = copy.deepcopy(model).double().eval()
    parameters = {name: p for name, p in double.named_parameters() if p.requires_grad}
    rows = {name: [] for name in parameters}
    for i, n in enumerate(batch.lengths):
        ids = batch.ids[i:i + 1, :n]
        logp = token_logp(double(ids), ids, temperature)[batch.mask[i:i + 1, :n]].sum()
        scale = 1 / max(int(batch.mask[i].sum()), 1) if length_norm else 1.0
        for name, gradient in zip(parameters, torch.autograd.grad(logp, list(parameters.values()), allow_unused=True),
                                  strict=True):
            rows[name].append(torch.zeros(parameters[name].numel(), dtype=torch.float64) if gradient is None
                              else gradient.reshape(-1) * scale)
    return {name: torch.stack(values) for name, values in rows.items()}
