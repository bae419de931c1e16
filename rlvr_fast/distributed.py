"""What collective calls share: ranks that tell each other what they were asked, and gather what they have."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

MESSAGE_BYTES = 1024  # what one rank tells the others of its arguments
REFUSED = "refused: "


def checksum(values: object) -> str:
    """Eight digits that differ where the representations of plain values do."""
    return f"{zlib.crc32(repr(values).encode()):08x}"


def carries_cpu_tensors(group: dist.ProcessGroup | None) -> bool:
    return "cpu:" in dist.get_backend_config(group)


def carrier(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must be to travel over ``group``: on the host if it can."""
    if carries_cpu_tensors(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # a group that does not carry CPU tensors has an accelerator's backend
    return accelerator


def gather(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's ``values``, in rank order: [ranks, ...]."""
    values = values.contiguous()
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(gathered.unbind(0)), values, group=group)
    return gathered


def tell(words: str, group: dist.ProcessGroup | None) -> list[str]:
    """Every rank's words, in rank order."""
    text = words.encode()[:MESSAGE_BYTES]
    message = torch.tensor(list(text.ljust(MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=carrier(group))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gather(message, group).tolist()]


def raise_refusals(told: list[str]) -> None:
    """Raise ValueError if a rank's words begin with ``REFUSED``."""
    refusals = [f"rank {rank} {words}" for rank, words in enumerate(told) if words.startswith(REFUSED)]
    if refusals:
        raise ValueError("; ".join(refusals))
