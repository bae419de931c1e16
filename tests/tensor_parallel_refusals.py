"""What ``ModelGap`` refuses where two ranks share layers, for test_model_gap_tensor_parallel."""

from __future__ import annotations

import tensor_parallel_models as models
import torch
import torch.distributed as dist
from model_gap_refusals import refused
from tensor_parallel_ranks import problem, token_logp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rlvr_fast as rf

__all__ = ["REFUSALS", "refused"]


def spread_model(which: str = "replicated norms"):
    return models.parallelize(models.build(**models.FEATURES[which]), init_device_mesh("cpu", (2,)), which)


def other_responses(rank: int) -> None:
    rf.ModelGap(spread_model(), problem(0, range(4 * rank, 4 * rank + 4))[0].rollouts)


def uneven_loss(rank: int) -> None:
    """Said by no rank's logits alone."""
    model, (part, advantages) = spread_model(), problem(0, range(12))
    with rf.ModelGap(model, part.rollouts) as probe:
        weights = advantages[:, None] * torch.ones_like(part.mask, dtype=torch.float32)
        weights[:, ::2] *= 3
        (token_logp(model, part.ids) * weights * part.mask).sum().backward()
    probe.gap()


def a_problem_on_rank_one(rank: int) -> None:
    model, (part, advantages) = spread_model(), problem(0, range(12))
    with rf.ModelGap(model, part.rollouts) as probe:
        loss = (token_logp(model, part.ids) * advantages[:, None] * part.mask).sum()
        loss.backward(retain_graph=rank == 1)
        if rank == 1:
            probe._recording.problems.append("a second backward")
    probe.gap()


def in_ddp_of_a_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = models.parallelize(models.build(), mesh["tensor"], "replicated norms")
    rf.ModelGap(DistributedDataParallel(model, device_mesh=mesh["data"]), problem(0, [0])[0].rollouts)


def the_wrong_group(rank: int) -> None:
    rf.ModelGap(spread_model(), problem(0, [0])[0].rollouts, group=dist.group.WORLD)


def fully_shard_over_layers(rank: int) -> None:
    """The group of the layers instead of that of the responses."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = models.parallelize(models.build(), mesh["tensor"], "replicated norms")
    rf.ModelGap(fully_shard(model, mesh=mesh["data"]), problem(0, [0])[0].rollouts, group=mesh.get_group("tensor"))


def rows_of_another_shard(rank: int) -> None:
    rf.ModelGap(models.build(), problem(0, [0])[0].rollouts, vocabulary=rf.VocabularyShard.even(29))


def two_kinds_of_head(rank: int) -> None:
    rf.ModelGap(spread_model(), problem(0, [0])[0].rollouts, vocabulary=rf.VocabularyShard.even(29))


def parallelized_too_late(rank: int) -> None:
    model = models.build()
    probe = rf.ModelGap(model, problem(0, [0])[0].rollouts)
    models.parallelize(model, init_device_mesh("cpu", (2,)), "replicated norms")
    probe.__enter__()


def a_part_of_the_direction(rank: int) -> None:
    model = spread_model()
    rf.ModelGap(model, problem(0, [0])[0].rollouts, direction={"blocks.0.q.weight": torch.ones(6, 12)})


REFUSALS = {
    "a bad argument on rank 1": lambda rank: rf.ModelGap(spread_model(), problem(0, [0])[0].rollouts,
                                                         temperature=1.0 - rank),
    "different options": lambda rank: rf.ModelGap(spread_model(), problem(0, [0])[0].rollouts, seed=rank),
    "other responses": other_responses,
    "a loss that says nothing": uneven_loss,
    "a problem on rank 1": a_problem_on_rank_one,
    "in a DistributedDataParallel of a mesh": in_ddp_of_a_mesh,
    "the wrong group": the_wrong_group,
    "fully_shard over layers": fully_shard_over_layers,
    "rows of another shard": rows_of_another_shard,
    "two kinds of head": two_kinds_of_head,
    "parallelized too late": parallelized_too_late,
    "a part of the direction": a_part_of_the_direction,
}
