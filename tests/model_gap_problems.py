"""The steps that the ranks of test_model_gap_parallel share: twelve responses to three prompts, and who has which."""

from __future__ import annotations

import model_zoo as zoo
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rlvr_fast as rf

OWNERS = [0] * 4 + [1] * 3 + [2] * 5  # the prompt of each response; prompt 1 is solved and has no gap
CORRECT = [1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]
WHOLE = {1: [range(12)], 2: [range(4), range(4, 12)], 3: [range(4), range(4, 7), range(7, 12)]}
SPLIT = {1: [range(12)], 2: [[0, 2, 4, 5, 9], [1, 3, 6, 7, 8, 10, 11]], 3: [[0, 1, 5], [2, 6, 7, 8], [3, 4, 9, 10, 11]]}


def shares(method: str, ranks: int) -> list:
    """The responses of each rank: prompts may be split with "sketch" alone."""
    return (SPLIT if method == "sketch" else WHOLE)[ranks]


def problem(step: int, rows, *, even_width: bool = False) -> tuple[zoo.Batch, torch.Tensor]:
    """The responses ``rows`` of a step's twelve, as a batch of its own, and their advantages."""
    generator = torch.Generator().manual_seed(step)
    whole = zoo.sample(generator, n_prompts=3, order=OWNERS, correct=CORRECT)
    if even_width:  # as sequence-parallel plans ask
        odd = whole.ids.shape[1] % 2
        whole.ids, whole.mask = (torch.nn.functional.pad(x, (0, odd)) for x in (whole.ids, whole.mask))
    advantages = torch.randn(12, generator=generator)
    advantages[4:7] = 0.0
    rows = list(rows)
    part = whole.rows(rows)
    part.rollouts = rf.Rollouts.from_padded(part.ids, part.mask, torch.tensor(CORRECT)[rows],
                                            prompt_ids=[f"prompt {OWNERS[i]}" for i in rows])
    return part, advantages[rows]


def direction() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {"embed.weight": torch.randn(zoo.VOCABULARY, zoo.WIDTH, generator=generator),
            "norm.weight": torch.randn(zoo.WIDTH, generator=generator)}


def loss_of(model, part: zoo.Batch, advantages: torch.Tensor, probe=None) -> torch.Tensor:
    """−Σ A_i log π(o_i) over a rank's responses, times the number of ranks: averaging brings their sum."""
    logp = zoo.token_logp(model(part.ids), part.ids)
    if probe is not None:
        probe.backward(logp, part.mask)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return -ranks * (advantages[:, None] * logp * part.mask).sum()


def shard(model: torch.nn.Module, reshard: bool) -> torch.nn.Module:
    """Under ``fully_shard``, block by block; the weight of head and embedding stays with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
