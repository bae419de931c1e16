"""Tables of measured tiles as files: read, checked, merged, written, and put to use.

    {"tiles": [{"chip": "NVIDIA H200", "bytes_per_element": 2, "n_tokens": 8192, ..., "tile": {"rows": 128, ...}}]}

The fields are those of ``kernels.config.TunedTile``. ``rlvr_fast.tuning`` produces such files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlvr_fast import _validate as check
from rlvr_fast.kernels.config import HeadTile, TunedTile, shipped_tiles, use_tiles

_POWERS = tuple(2**i for i in range(4, 10))
_ALLOWED = {"rows": _POWERS, "columns": _POWERS, "depth": _POWERS, "slices": (1, 2, 4, 8),
            "num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9), "group": range(1, 1025),
            "descriptors": (False, True), "input_precision": ("ieee", "tf32x3")}
_SIZES = ("bytes_per_element", "n_tokens", "vocabulary_size", "hidden_size")


def load_tiles(path: str | os.PathLike[str] | None) -> tuple[TunedTile, ...]:
    """Use the tiles of a file, ahead of those that come with the package; None goes back to the latter alone.

    Call it once per process, on every rank with the same file, before the first kernel. It replaces what an earlier
    call loaded. Tiles change how fast a result comes and the order in which it is rounded, nothing else.

    Args:
        path: a JSON file as ``tune_head`` writes it, or None.

    Returns:
        The entries of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table of tiles, saying where; the table in use stays as it was.
    """
    own = () if path is None else read_tiles(path)
    use_tiles([*own, *shipped_tiles()])
    return own


def read_tiles(path: str | os.PathLike[str]) -> tuple[TunedTile, ...]:
    """The checked entries of a table file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a JSON table of tiles, got text that is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("tiles"), list):
        raise ValueError(f'{path} must hold an object with a list "tiles", got {check.describe(content)}')
    return tuple(_entry(f"entry {index} of {path}", row) for index, row in enumerate(content["tiles"]))


def merge_tiles(path: str | os.PathLike[str], new: Sequence[TunedTile]) -> tuple[TunedTile, ...]:
    """Write ``new`` into the file at ``path``, in place of entries for the same chip, dtype size and shape.

    The file is replaced in one step: a reader sees the old table or the new one, and a failure leaves the old one.
    """
    path = Path(path)
    merged = {row.key: row for row in (read_tiles(path) if path.exists() else ())} | {row.key: row for row in new}
    rows = sorted(merged.values(), key=lambda row: row.key)
    text = json.dumps({"tiles": [row.to_json() for row in rows]}, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    try:
        os.chmod(file.name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
    return tuple(rows)


def check_tile(name: str, tile: Any) -> HeadTile:
    """Return ``tile`` if it is a HeadTile whose numbers the kernels can take."""
    if not isinstance(tile, HeadTile):
        raise TypeError(f"{name} must be a HeadTile, got {check.describe(tile)}")
    for field, allowed in _ALLOWED.items():
        value = getattr(tile, field)
        if type(value) is not type(allowed[0]) or value not in allowed:
            raise ValueError(f"{name}.{field} must be in {allowed}, got {value!r}")
    if tile.slice_columns < 8:
        raise ValueError(f"{name} must have 8 columns or more per slice, got {tile.columns} in {tile.slices} slices")
    return tile


def _entry(name: str, row: Any) -> TunedTile:
    wanted, of_tile = ({field.name for field in fields(kind)} for kind in (TunedTile, HeadTile))
    if not isinstance(row, dict) or set(row) != wanted:
        raise ValueError(f"{name} must be an object with {', '.join(sorted(wanted))}; got {check.describe(row)}")
    if not isinstance(row["tile"], dict) or set(row["tile"]) != of_tile:
        raise ValueError(f"tile of {name} must be an object with {', '.join(sorted(of_tile))}; "
                         f"got {check.describe(row['tile'])}")
    for field in _SIZES:
        if type(row[field]) is not int or row[field] < 1:
            raise ValueError(f"{field} of {name} must be an integer of 1 or more, got {row[field]!r}")
    for field in ("milliseconds", "default_milliseconds"):
        check.positive(f"{field} of {name}", row[field])
    for field in ("chip", "architecture", "date"):
        if not isinstance(row[field], str):
            raise ValueError(f"{field} of {name} must be a string, got {row[field]!r}")
    if not isinstance(row["operations"], list) or not isinstance(row["versions"], dict):
        raise ValueError(f"operations of {name} must be a list and versions an object, "
                         f"got {row['operations']!r} and {row['versions']!r}")
    entry = TunedTile.from_json(row)
    check_tile(f"tile of {name}", entry.tile)
    return entry
