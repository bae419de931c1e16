"""What ``ModelGap`` refuses on the ranks of a group, for test_model_gap_parallel."""

from __future__ import annotations

from collections.abc import Callable

import model_zoo as zoo
import torch
import torch.distributed as dist
from model_gap_problems import SPLIT, WHOLE, loss_of, problem, shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rlvr_fast as rf


def refused(attempt: Callable[[int], object]) -> str:
    """What ``attempt(rank)`` raises."""
    try:
        attempt(dist.get_rank())
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def probe_of(rank: int, method: str = "segmented", rows=None, **options) -> tuple[rf.ModelGap, zoo.Batch, torch.Tensor]:
    part, advantages = problem(0, WHOLE[dist.get_world_size()][rank] if rows is None else rows)
    return rf.ModelGap(zoo.build(), part.rollouts, method, group=dist.group.WORLD, **options), part, advantages


def split_prompt(rank: int) -> None:
    probe, part, advantages = probe_of(rank, rows=SPLIT[dist.get_world_size()][rank])
    with probe:
        loss_of(probe.model, part, advantages).backward()
    probe.gap()


def clipped_on_the_last_rank(rank: int) -> None:
    probe, part, advantages = probe_of(rank)
    with probe:
        weights = advantages[:, None] * torch.ones_like(part.mask, dtype=torch.float32)
        if rank == dist.get_world_size() - 1:
            weights[:, ::2] *= 3
        (zoo.token_logp(probe.model(part.ids), part.ids) * weights * part.mask).sum().backward()
    probe.gap()


def no_gradient_for_a_member_of_a_prompt(rank: int) -> None:
    """On each rank alone the prompt has one class, and all could be well."""
    part, _ = problem(0, [0, 2] if rank == 0 else [1, 3])
    model = zoo.build()
    with rf.ModelGap(model, part.rollouts, "sketch", group=dist.group.WORLD) as probe:
        loss_of(model, part, torch.full((2,), float(rank))).backward()
    probe.gap()


def sharded_alone(rank: int) -> None:
    rf.ModelGap(shard(zoo.build(), reshard=True), problem(0, [0])[0].rollouts)


def exact_in_an_engine(rank: int) -> None:
    rf.ModelGap(DistributedDataParallel(zoo.build()), problem(0, [0])[0].rollouts, "exact")


def an_engine_inside(rank: int) -> None:
    rf.ModelGap(torch.nn.Sequential(DistributedDataParallel(zoo.build())), problem(0, [0])[0].rollouts)


def mixed_precision(rank: int) -> None:
    model = DistributedDataParallel(zoo.build())
    model.mixed_precision = torch.float16
    rf.ModelGap(model, problem(0, [0])[0].rollouts)


def sharded_direction(rank: int) -> None:
    model = shard(zoo.build(), reshard=True)
    rf.ModelGap(model, problem(0, [0])[0].rollouts, direction={"norm.weight": model.norm.weight.detach()},
                group=dist.group.WORLD)


def counted_prompts(rank: int) -> None:
    """With group_size every rank's prompts are 0, 1, ..., different ones on different ranks."""
    part, _ = problem(0, WHOLE[dist.get_world_size()][rank])
    rollouts = rf.Rollouts.from_padded(part.ids, part.mask, part.rollouts.correct.float(), group_size=4)
    rf.ModelGap(zoo.build(), rollouts, "sketch", group=dist.group.WORLD)


def tensor_parallel_later(rank: int) -> None:
    part, _ = problem(0, [0])
    with rf.ModelGap(zoo.build(), part.rollouts) as probe:
        parallelize_module(probe.model.lm_head, init_device_mesh("cpu", (dist.get_world_size(),)), ColwiseParallel())
        probe.model(part.ids)


REFUSALS = {
    "a prompt on several ranks": split_prompt,
    "a bad argument on rank 0": lambda rank: probe_of(rank, temperature=float(rank)),
    "different options": lambda rank: probe_of(rank, "sketch", seed=rank),
    "a loss that says nothing on the last rank": clipped_on_the_last_rank,
    "a response without gradient": no_gradient_for_a_member_of_a_prompt,
    "fully_shard without a group": sharded_alone,
    "exact in an engine": exact_in_an_engine,
    "an engine inside": an_engine_inside,
    "mixed precision": mixed_precision,
    "a sharded direction": sharded_direction,
    "prompts counted from 0 on both ranks": counted_prompts,
    "tensor parallel inside the context": tensor_parallel_later,
    "no group": lambda rank: rf.ModelGap(zoo.build(), problem(0, [0])[0].rollouts, group="all"),
}
