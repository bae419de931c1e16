"""Tile shapes of the kernels, in one place: what runs where.

``head_tile`` looks up a table of measured tiles first (``tuned.json``, or what ``use_tiles`` put in its place) and
falls back to ``HEAD_TILES``, whose numbers follow from the register and shared-memory budgets given with them. Nothing
is tuned while a training step waits: that would cost seconds per shape, and two ranks could choose differently. The
choice depends on the chip, the shape and the table alone, all known on the host.

Nothing has been measured on a GPU yet: ``tuned.json`` is empty. ``rlvr_fast.tuning`` measures and fills such tables.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files

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
        """Twice the slices: a soft cap's logits and their derivatives need registers of their own.

        Not below 32 columns, where the registers suffice anyway, and not beyond the 8 slices that there are.
        """
        return replace(self, slices=2 * self.slices) if self.slices < 8 and self.slice_columns > 32 else self

    def __str__(self) -> str:
        return (f"{self.rows}x{self.columns}x{self.depth} warps={self.num_warps} stages={self.num_stages} "
                f"slices={self.slices} group={self.group}")


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

# What ``rlvr_fast.tuning`` measures against HEAD_TILES' entry of the same key. All compile without spills with every
# option of the head (bench/compile_kernels.py). A multiprocessor has 227 KiB of shared memory and 65536 registers: with
# at most 113 KiB, and 255 registers a thread at 4 warps or 128 at 8, two programs share it and the epilogue of one runs
# under the product of the other.
HEAD_TILE_CANDIDATES = {
    ("sm90", 2): (
        # The default's tile. A group of 8 or 32 row tiles trades re-reads of the weight against those of hidden.
        HeadTile(128, 256, 64, 8, 4, 8, 4, True),
        HeadTile(128, 256, 64, 32, 4, 8, 4, True),
        # More slices mean more partial statistics to write and merge, and registers to overlap with. Two slices, with
        # fewer statistics, spill 40 bytes a thread with numerators, bias and soft cap (Triton 3.6.0): dropped.
        HeadTile(128, 256, 64, 16, 8, 8, 4, True),
        # 144 KiB: what the fourth stage no longer holds is L1 cache for the epilogue.
        HeadTile(128, 256, 64, 16, 4, 8, 3, True),
        # Half as many barriers per product, at the price of two stages only.
        HeadTile(128, 256, 128, 16, 4, 8, 2, True),
        # The weight, the larger operand, is read by half as many row tiles.
        HeadTile(256, 128, 64, 8, 2, 8, 4, True),
        HeadTile(256, 128, 64, 16, 2, 8, 3, True),
        HeadTile(256, 128, 64, 8, 4, 8, 4, True),
        # Two programs per multiprocessor: 96 KiB and 128 threads each, the accumulator in 128 registers a thread.
        HeadTile(128, 128, 64, 16, 2, 4, 3, True),
        HeadTile(128, 128, 64, 16, 4, 4, 3, True),
        HeadTile(128, 128, 64, 32, 2, 4, 3, True),
        # The same with 80 KiB: less traffic per multiply-add than 128 x 128 on the hidden side, more on the weight's.
        HeadTile(64, 256, 64, 32, 4, 4, 2, True),
        # 64 accumulator registers a thread leave room for two programs of 8 warps where there is no soft cap.
        HeadTile(128, 128, 64, 16, 2, 8, 3, True),
    ),
}

# No buffer of logits or partial statistics takes more than this, whatever N and V are.
CHUNK_BYTES = 320 << 20


@dataclass(frozen=True)
class TunedTile:
    """One row of the table of measured tiles: on ``chip``, for operands of ``bytes_per_element`` and a shape near this
    one, ``tile`` took ``milliseconds`` where the entry of HEAD_TILES took ``default_milliseconds``.

    ``operations`` says what was timed, ``versions`` with what, ``date`` when (ISO).
    """

    chip: str
    architecture: str
    bytes_per_element: int
    n_tokens: int
    vocabulary_size: int
    hidden_size: int
    tile: HeadTile
    milliseconds: float
    default_milliseconds: float
    operations: tuple[str, ...]
    date: str
    versions: dict[str, str]

    @property
    def key(self) -> tuple:
        """What an entry answers for; a table has one entry per key."""
        return self.chip, self.bytes_per_element, self.n_tokens, self.vocabulary_size, self.hidden_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, D)."""
        return self.n_tokens, self.vocabulary_size, self.hidden_size

    @classmethod
    def from_json(cls, row: dict) -> TunedTile:
        return cls(**row | {"tile": HeadTile(**row["tile"]), "operations": tuple(row["operations"])})

    def to_json(self) -> dict:
        return asdict(self) | {"operations": list(self.operations)}


def shipped_tiles() -> tuple[TunedTile, ...]:
    """The table that comes with the package."""
    rows = json.loads(files(__package__).joinpath("tuned.json").read_text(encoding="utf-8"))["tiles"]
    return tuple(map(TunedTile.from_json, rows))


_tiles_in_use = shipped_tiles()
_only_tile: HeadTile | None = None


def tiles_in_use() -> tuple[TunedTile, ...]:
    """The table that ``head_tile`` looks up."""
    return _tiles_in_use


def use_tiles(tiles: Sequence[TunedTile]) -> None:
    """Replace the table. Where two entries are equally near, the earlier one counts."""
    global _tiles_in_use
    _tiles_in_use = tuple(tiles)
    _measured_tile.cache_clear()


@contextlib.contextmanager
def only_tile(tile: HeadTile) -> Iterator[None]:
    """Inside the block every product runs on ``tile``, whatever its shape: for measuring tiles."""
    global _only_tile
    before, _only_tile = _only_tile, tile
    try:
        yield
    finally:
        _only_tile = before


def head_tile(device: torch.device, dtype: torch.dtype, softcap: float | None,
              shape: tuple[int, int, int]) -> HeadTile:
    """The tile for operands of ``dtype`` on ``device``; a CPU device means the Triton interpreter.

    ``shape``: (N, V, D) of the product.
    """
    tile = (_only_tile or _measured_tile(chip(device), dtype.itemsize, shape)
            or HEAD_TILES[architecture(device), dtype.itemsize])
    return tile if softcap is None else tile.with_softcap()


@functools.lru_cache(maxsize=4096)  # the number of tokens changes from step to step
def _measured_tile(name: str, itemsize: int, shape: tuple[int, int, int]) -> HeadTile | None:
    return nearest_tile([row for row in _tiles_in_use if (row.chip, row.bytes_per_element) == (name, itemsize)], shape)


def nearest_tile(tiles: Sequence[TunedTile], shape: tuple[int, int, int]) -> HeadTile | None:
    """The tile measured nearest to (N, V, D): the smallest sum of |log2| of the three ratios of sizes.

    Only measurements within a factor of 2 in V and in D, and on at most 4 N tokens, count: on more tokens than measured
    the chip does more of the same, on far fewer it is not full. None if there is none.
    """
    near = []
    for row in tiles:
        n, v, d = (math.log2(max(size, 1) / measured) for size, measured in zip(shape, row.shape, strict=True))
        if n >= -2 and abs(v) <= 1 and abs(d) <= 1:
            near.append((abs(n) + abs(v) + abs(d), row.tile))
    return min(near, key=lambda pair: pair[0])[1] if near else None


@functools.cache
def chip(device: torch.device) -> str:
    """The table's name of the device, as its driver gives it, in single spaces: "NVIDIA H200"."""
    return "interpreter" if device.type == "cpu" else " ".join(torch.cuda.get_device_name(device).split())


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
