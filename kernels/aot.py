"""Specialisations of the logit-tile kernels for the ahead-of-time compile gate.

A kernel module lists what to compile in ``aot_specializations()``: dicts with ``name``, ``fn``, ``signature`` (Triton
type of every run-time argument), ``constexprs``, ``num_warps``, ``num_stages``, ``hot`` (may not spill),
``expects_matrix`` (must use the matrix unit), and optionally ``targets`` (architectures; all if absent),
``divisible_by_16`` (integers that are multiples of 16 in practice, which the launch would find out) and ``candidate``
(true if it runs only where somebody measured it to be faster). Pointers are taken to be 16-byte aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from rlvr_fast.kernels.config import HEAD_TILE_CANDIDATES, HEAD_TILES, HeadTile, shipped_tiles
from rlvr_fast.kernels.logit_tile import tile_options

_TRITON_DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}


def head_specializations(name: str, kernel, pointers: dict[str, str | None], integers: Iterable[str],
                         variants: Iterable[tuple[str, dict[str, str | None]]]) -> list[dict]:
    """A kernel over tiles of hidden @ weight.T, for every tile, architecture and operand dtype of the configuration.

    Args:
        pointers: type of each pointer besides hidden, weight and bias; None for the operands' type.
        integers: the kernel's own integer arguments.
        variants: (suffix, types) of the optional arguments: None where absent.
    """
    integers = ("n_rows", "n_columns", "depth", "hidden_stride", "weight_stride", *integers)
    entries = []
    for architecture, itemsize, tile, label in _tiles():
        hot = itemsize == 2
        # A candidate's fp16 twin differs from it in the type of two instructions.
        for dtype in _TRITON_DTYPES[itemsize][:1 if label else None]:
            base = {pointer: kind or f"*{dtype}" for pointer, kind in pointers.items()}
            base |= dict.fromkeys(integers, "i32") | {"logit_scale": "fp32"}
            for suffix, types in variants:
                for extra, shape, loads, options in _heads(dtype, tile):
                    kinds = base | _operand_types(dtype, shape, loads) | options | types
                    entries.append({
                        "name": f"{name} {dtype}{suffix}{extra}{label}", "fn": kernel,
                        "signature": {key: kind for key, kind in kinds.items() if kind is not None},
                        "constexprs": tile_options(shape) | {"LOADS": loads}
                        | {key: None for key, kind in kinds.items() if kind is None},
                        "num_warps": shape.num_warps, "num_stages": shape.num_stages, "hot": hot,
                        "expects_matrix": hot, "targets": (architecture,), "divisible_by_16": integers,
                        "candidate": bool(label),
                    })
    return entries + [_on_matrix_unit(entry) for entry in entries
                      if entry["name"] == f"{name} fp32" and entry["targets"] != ("gfx942",)]


def _tiles() -> Iterator[tuple[str, int, HeadTile, str]]:
    """(architecture, bytes per element, tile, label) of the defaults, without label, and of what may replace them.

    Tiles that differ only in ``group`` are compiled once: it permutes the programs and touches no inner loop.
    """
    for (architecture, itemsize), default in HEAD_TILES.items():
        if architecture == "interpreter":
            continue
        yield architecture, itemsize, default, ""
        others = [*HEAD_TILE_CANDIDATES.get((architecture, itemsize), ()),
                  *(row.tile for row in shipped_tiles() if (row.architecture, row.bytes_per_element)
                    == (architecture, itemsize))]
        for tile in dict.fromkeys(replace(tile, group=default.group) for tile in others):
            if tile != default:
                yield architecture, itemsize, tile, f" {tile}"


def _on_matrix_unit(entry: dict) -> dict:
    """The fp32 kernel with the configuration's other ``input_precision``."""
    return entry | {"name": f"{entry['name']} tf32x3", "expects_matrix": True,
                    "constexprs": entry["constexprs"] | {"INPUT_PRECISION": "tf32x3"}}


def _heads(dtype: str, tile: HeadTile) -> list[tuple[str, HeadTile, str, dict[str, str | None]]]:
    """(suffix, tile, loads, optional arguments) of the plain head and of the one with everything, unaligned too."""
    plain = ("", tile, "descriptor" if tile.descriptors else "even", {"bias": None, "softcap": None})
    full = (" bias softcap", tile.with_softcap(), "masked", {"bias": f"*{dtype}", "softcap": "fp32"})
    return [plain] if dtype == "fp16" else [plain, full]


def _operand_types(dtype: str, tile: HeadTile, loads: str) -> dict[str, str]:
    if loads == "descriptor":
        return {"hidden": f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>",
                "weight": f"tensordesc<{dtype}[{tile.columns}, {tile.depth}]>"}
    return {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
