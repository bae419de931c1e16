"""Which ranks share a model's layers and which hold other responses, by the meshes that its parameters lie on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from rlvr_fast.model_gap.tensor_parallel.layers import is_dtensor
from rlvr_fast.vocabulary_parallel import VocabularyShard, check_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def layer_group(parameters: dict[str, nn.Parameter], gathered: tuple[str, ...], group: dist.ProcessGroup | None,
                vocabulary: VocabularyShard | None) -> dist.ProcessGroup | None:
    """The ranks among which layers are spread; None where every rank has the whole of them.

    Args:
        gathered: prefixes of the parameters that ``fully_shard`` gathers for their layers.
        group: the ranks that hold other responses; dimensions of a mesh within it are data-parallel.
        vocabulary: the shard of a loop's own vocabulary-parallel head.

    Raises:
        ValueError: if a sharded model's gradients are not whole within both, or layers are spread in two ways.
    """
    own = {dist.get_rank()} if dist.is_available() and dist.is_initialized() else set()
    data = own if group is None else set(dist.get_process_group_ranks(group))
    found: dict[str, dist.ProcessGroup | None] = {}
    if vocabulary is not None:
        own_group = dist.group.WORLD if check_shard(vocabulary).group is None else vocabulary.group
        found["the vocabulary"] = own_group
    for name, parameter in parameters.items():
        if not is_dtensor(parameter):
            continue
        mesh = parameter.device_mesh
        wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        spread = [dim for dim in wide if not set(dist.get_process_group_ranks(mesh.get_group(dim))) <= data]
        last = mesh.ndim - 1
        if not spread and mesh.size(last) == 1 and not (name.startswith(gathered) and last == 0):
            spread = [last]  # over one rank, as a plan for many may have it
        if name.startswith(gathered):
            _check_gathered(name, mesh, spread, data, group)
        elif wide and spread != wide:
            raise ValueError(f"group must hold ranks with responses of their own, {name} is spread over "
                             f"{mesh.mesh.flatten().tolist()}, which share its layer; got {sorted(data)}")
        if len(spread) > 1:
            raise ValueError(f"model must be tensor-parallel over one dimension of a mesh, {name} is over "
                             f"{len(spread)} of {mesh}")
        if spread:
            found[name] = mesh.get_group(spread[0])
    ranks = {name: tuple(dist.get_process_group_ranks(own_group)) for name, own_group in found.items()}
    if not found:
        return None
    first = next(iter(found))
    for name, those in ranks.items():
        if those != ranks[first]:
            raise ValueError(f"model must have its layers spread over the same ranks, {first} is over "
                             f"{list(ranks[first])} and {name} over {list(those)}")
    if data & set(ranks[first]) != own:
        raise ValueError(f"group must hold ranks with responses of their own, got {sorted(data)}: {first} is spread "
                         f"over {list(ranks[first])}")
    return found[first]


def _check_gathered(name: str, mesh: DeviceMesh, spread: list[int], data: set[int], group: dist.ProcessGroup | None
                    ) -> None:
    """``fully_shard`` shards over the leading dimensions of a mesh, and ``group`` holds all of those."""
    ranks, here = mesh.mesh, mesh.get_coordinate()
    if here is not None and mesh.ndim > 1 and spread == [mesh.ndim - 1]:
        ranks = ranks.select(-1, here[-1])
    held = set(ranks.flatten().tolist())
    if held != data:
        got = None if group is None else sorted(data)
        raise ValueError(f"group must hold the ranks that {name} is sharded over, {sorted(held)}; got {got}")
