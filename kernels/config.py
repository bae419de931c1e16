"""Tile shapes of the kernels, in one table: what runs where.

Autotuning is not used: it costs seconds per shape inside a training step, and its choice may differ between ranks. The
numbers below follow from the register and shared-memory budgets given with them. They have not been measured on a GPU
yet; a measurement changes this file and nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class HeadTile:
    """One program's share of hidden @ weight.T: ``rows`` tokens, ``columns`` vocabulary entries, ``depth`` of D a step.

    ``group`` row tiles are walked before the next vocabulary tile, so that what runs at one time shares both operands
    in the L2 cache: with 132 programs of 128 x 256 in flight, 16 by 8 tiles read least. The epilogue works on
    ``slices`` column slices one after the other, which is what keeps it inside the register file. ``descriptors``:
    operands come through the bulk copy engine where their alignment allows it. ``input_precision`` of fp32 products:
    "ieee", or "tf32x3", which takes NVIDIA's matrix unit three times and keeps about 22 of 24 bits.
    """

    rows: int
    columns: int
    depth: int
    group: int
    slices: int
    num_warps: int
    num_stages: int
    descriptors: bool
    input_precision: str = "ieee"

    @property
    def slice_columns(self) -> int:
        """Columns that share one set of partial statistics."""
        return self.columns // self.slices

    def with_softcap(self) -> HeadTile:
        """Twice the slices: a soft cap's logits and their derivatives need registers of their own."""
        return replace(self, slices=2 * self.slices)


# (architecture, bytes per element of the operands)
HEAD_TILES = {
    # 8 warps hold the 128 x 256 fp32 accumulator in 128 registers a thread; 4 stages take 192 of 227 KiB.
    ("sm90", 2): HeadTile(128, 256, 64, 16, 4, 8, 4, True),
    # The accumulator lives in tensor memory.
    ("sm100", 2): HeadTile(128, 256, 64, 16, 4, 8, 4, True),
    # Half the accumulator, since here it shares the registers with the operands; fits the consumer chips' 99 KiB too.
    ("sm80", 2): HeadTile(128, 128, 32, 16, 2, 8, 4, False),
    # 64 KiB of shared memory.
    ("gfx942", 2): HeadTile(128, 128, 64, 16, 2, 4, 2, False),
    # fp32 products do not use the matrix unit on NVIDIA: the accurate, slow path.
    ("sm90", 4): HeadTile(64, 128, 16, 16, 1, 8, 3, False),
    ("sm100", 4): HeadTile(64, 128, 16, 16, 1, 8, 3, False),
    ("sm80", 4): HeadTile(64, 128, 16, 16, 1, 8, 3, False),
    ("gfx942", 4): HeadTile(64, 64, 32, 16, 1, 4, 2, False),
    # Small, so that small tests cross tile borders.
    ("interpreter", 2): HeadTile(16, 64, 16, 2, 4, 4, 1, True),
    ("interpreter", 4): HeadTile(16, 32, 16, 2, 2, 4, 1, True),
}

# No buffer of logits or partial statistics takes more than this, whatever N and V are.
CHUNK_BYTES = 512 << 20


def head_tile(device: torch.device, dtype: torch.dtype, softcap: float | None,
              shape: tuple[int, int, int]) -> HeadTile:
    """The tile for operands of ``dtype`` on ``device``; a CPU device means the Triton interpreter.

    ``shape``: (N, V, D) of the product.
    """
    tile = HEAD_TILES[architecture(device), dtype.itemsize]
    return tile if softcap is None else tile.with_softcap()


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name of the chip. An unlisted one gets the entry with the smallest demands of its vendor."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def chunks(total: int, size: int) -> list[tuple[int, int]]:
    """Borders of the pieces of at most ``size`` that cover 0..total; none when ``total`` is 0."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def chunk_size(total: int, bytes_per_item: int, multiple: int) -> int:
    """Items per chunk: as many as fit CHUNK_BYTES, evenly spread, in whole multiples of ``multiple``."""
    fitting = max(CHUNK_BYTES // bytes_per_item // multiple * multiple, multiple)
    n_chunks = max(-(-total // fitting), 1)
    even = -(-total // n_chunks)
    return max(-(-even // multiple) * multiple, multiple)
