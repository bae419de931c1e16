"""A small decoder as tensor-parallel plans want one (heads are counted, not fixed), and the plans that people use."""

from __future__ import annotations

import model_zoo as zoo
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import rlvr_fast as rf

HEAD = 3  # width of an attention head; zoo.WIDTH has four


class Block(nn.Module):
    """Attention with two key-value heads and a gated MLP; a bias wherever a plan may split or replicate one."""

    def __init__(self, q_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = zoo.RMSNorm(zoo.WIDTH), nn.LayerNorm(zoo.WIDTH)
        self.q, self.k = nn.Linear(zoo.WIDTH, zoo.WIDTH), nn.Linear(zoo.WIDTH, 2 * HEAD, bias=False)
        self.v, self.o = nn.Linear(zoo.WIDTH, 2 * HEAD), nn.Linear(zoo.WIDTH, zoo.WIDTH)
        self.q_norm = zoo.RMSNorm(HEAD) if q_norm else nn.Identity()
        self.gate, self.up = nn.Linear(zoo.WIDTH, 18), nn.Linear(zoo.WIDTH, 18, bias=False)
        self.down = nn.Linear(18, zoo.WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, HEAD)) for layer in (self.q, self.k, self.v))
        q, k, v = (local(y).transpose(1, 2) for y in (self.q_norm(q), k, v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2)).masked_fill(hidden, -1e9).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, tied: bool = False, q_norm: bool = False, head_bias: bool = False, linear_norm: bool = False,
                 checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.VOCABULARY, zoo.WIDTH)
        self.blocks = nn.ModuleList([Block(q_norm)])
        self.norm = nn.Linear(zoo.WIDTH, zoo.WIDTH) if linear_norm else zoo.RMSNorm(zoo.WIDTH)
        self.lm_head = nn.Linear(zoo.WIDTH, zoo.VOCABULARY, bias=head_bias)
        self.tied, self.checkpointing = tied, checkpointing
        self.tie()

    def tie(self) -> None:
        if self.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.lm_head(self.norm(x))


def build(dtype: torch.dtype = torch.float32, **features) -> Model:
    torch.manual_seed(0)
    model = Model(**features).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name or "norm.bias" in name or parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * (0.9 if parameter.ndim == 1 else zoo.WIDTH ** -0.5))
    return model


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


# -- plans ------------------------------------------------------------------------------------------------------------

FEATURES = {  # of the model that each plan is for
    "replicated norms": {"tied": True},
    "sequence": {"q_norm": True, "head_bias": True},
    "parallel loss": {},
    "other way round": {"head_bias": True, "dtype": torch.float64},
    "own head": {"head_bias": True},
    "local heads": {"q_norm": True},
    "half precision": {"q_norm": True, "dtype": torch.bfloat16},
    "spread tokens": {"linear_norm": True, "checkpointing": True},
}


def plan(which: str) -> dict:
    """By module of the model; "block.…" stands for every block."""
    layers = {f"block.{name}": ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    layers |= {f"block.{name}": RowwiseParallel() for name in ("o", "down")}
    if which in ("replicated norms", "local heads"):
        return layers | {"embed": RowwiseParallel(input_layouts=Replicate()),
                         "lm_head": ColwiseParallel(output_layouts=Replicate())}
    if which == "other way round":
        return layers | {"embed": ColwiseParallel(output_layouts=Replicate()),
                         "lm_head": RowwiseParallel(input_layouts=Replicate())}
    heads = {"input_layouts": Shard(1), "use_local_output": False}
    layers |= {f"block.{name}": ColwiseParallel(**heads) for name in ("q", "k", "v")}
    layers |= {f"block.{name}": ColwiseParallel(input_layouts=Shard(1)) for name in ("gate", "up")}
    layers |= {f"block.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ("o", "down")}
    layers |= {f"block.{name}": SequenceParallel() for name in ("norm1", "norm2")}
    head = {"output_layouts": Shard(-1), "use_local_output": False} if which == "parallel loss" else {
        "output_layouts": Replicate()}
    return layers | {"block.q_norm": SequenceParallel(sequence_dim=2), "norm": SequenceParallel(),
                     "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                     "lm_head": ColwiseParallel(input_layouts=Shard(1), **head)}


def parallelize(model: Model, mesh: DeviceMesh, which: str) -> Model:
    layers = plan(which)
    for block in model.blocks:
        own = {name.removeprefix("block."): style for name, style in layers.items() if name.startswith("block.")}
        if isinstance(block.q_norm, nn.Identity):
            own.pop("q_norm", None)
        parallelize_module(block, mesh, own)
    parallelize_module(model, mesh, {name: style for name, style in layers.items() if "." not in name})
    model.tie()
    return model


# -- a loop's own head ------------------------------------------------------------------------------------------------


class SharedInput(torch.autograd.Function):
    """The same on every rank, whose gradients add up."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class ShardedLogp(torch.autograd.Function):
    """log p of ``tokens`` from this rank's columns of the logits."""

    @staticmethod
    def forward(ctx, logits, tokens, shard):
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
        ids = shard.local_ids(tokens)
        own = torch.where(ids >= 0, logits.gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1), 0.0)
        mass = (logits - largest[..., None]).exp()
        total = mass.sum(-1)
        for part in (own, total):
            dist.all_reduce(part, group=shard.group)
        ctx.save_for_backward(mass / total[..., None], ids)
        return own - largest - total.log()

    @staticmethod
    def backward(ctx, gradient):
        p, ids = ctx.saved_tensors
        one_hot = nn.functional.one_hot(ids.clamp(min=0), p.shape[-1]) * (ids >= 0)[..., None]
        return gradient[..., None] * (one_hot - p), None, None


def own_head(model: Model, shard: rf.VocabularyShard) -> Model:
    """The lm_head of ``model`` cut down to the rows of ``shard``; plain tensors."""
    whole, rows = model.lm_head, slice(shard.first, shard.stop)
    model.lm_head = nn.Linear(zoo.WIDTH, shard.rows)
    with torch.no_grad():
        model.lm_head.weight.copy_(whole.weight[rows])
        model.lm_head.bias.copy_(whole.bias[rows])
    model.norm.register_forward_hook(lambda module, args, x: SharedInput.apply(x, shard.group))
    return model
