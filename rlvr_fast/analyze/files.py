"""Rows out of rollout files: JSONL, Parquet, npz, or a folder of them. One row is one response, as a dict.

Everything is read row by row, so a file may be larger than memory; what makes a file unreadable is said with its
name and line.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Row = dict[str, object]
ROWS_PER_BATCH = 8192


def rollout_files(path: str | Path) -> list[Path]:
    """The file itself, or the rollout files of a folder in the order of the numbers in their names (2 before 10).

    Raises:
        ValueError: if there is no such file, none in the folder, or of no known kind.
    """
    path = Path(path)
    if path.is_dir():
        found = [file for file in path.iterdir() if file.is_file() and _reader(file) is not None]
        if not found:
            raise ValueError(f"{path} holds no rollout files ({', '.join(READERS)})")
        return sorted(found, key=lambda file: natural(file.name))
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if _reader(path) is None:
        raise ValueError(f"{path} must end in one of {', '.join(READERS)}")
    return [path]


def rows_of(path: Path, columns: frozenset[str] | None = None) -> Iterator[Row]:
    """The rows of one file; with ``columns`` others may be left out (and are not read where the format allows).

    Raises:
        ValueError: naming file, line or column of what cannot be read; on the way, not before the first row.
    """
    reader = _reader(path)
    assert reader is not None  # of those that rollout_files found
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return reader(path, columns)


def _reader(path: Path) -> Callable[[Path, frozenset[str] | None], Iterator[Row]] | None:
    return next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), None)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by the numbers in them: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def json_lines(path: Path, columns: frozenset[str] | None = None, *, cut_off: Callable[[], None] | None = None
               ) -> Iterator[Row]:
    """The objects of a JSONL file, also a gzipped one, as ``rows_of``.

    Args:
        cut_off: called for a last line that is cut off, as of a run that is being written, which is then left out. By
            default that is refused.
    """
    number, line = 0, ""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if line.endswith("\n"):
                        parsed = error if isinstance(error, json.JSONDecodeError) else None
                        detail = error if parsed is None else f"{parsed.msg} at column {parsed.colno}"
                        raise ValueError(f"{path}, line {number}: no JSON ({detail})") from None
                    if cut_off is None:
                        raise ValueError(f"{path}, line {number}: the file is cut off in the middle of its last row; "
                                         f"remove it with: sed -i '$d' {path}") from None
                    cut_off()
                    return
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: must be a JSON object, got {line.strip()[:60]}")
                yield row if columns is None else {name: row[name] for name in columns if name in row}
    except UnicodeDecodeError:
        raise ValueError(f"{path}, after line {number}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: not a whole gzip file ({error})") from None


def _parquet(path: Path, columns: frozenset[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; pip install 'rlvr-fast[report]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=wanted):
                yield from batch.to_pylist()
    except Exception as error:
        raise ValueError(f"{path}: no readable Parquet file ({_reason(error)})") from None


def _npz(path: Path, columns: frozenset[str] | None) -> Iterator[Row]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if columns is None or name in columns}
    except Exception as error:
        raise ValueError(f"{path}: no readable npz archive of plain arrays ({_reason(error)})") from None
    scalar = [name for name, array in arrays.items() if array.ndim == 0]
    if scalar:
        raise ValueError(f"{path}: {scalar[0]} must have one entry per response, got a single value")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: all arrays must have one entry per response, got "
                         + ", ".join(f"{name} {length}" for name, length in lengths.items()))
    for values in zip(*(array.tolist() for array in arrays.values()), strict=True):
        yield dict(zip(arrays, values, strict=True))


def _reason(error: Exception) -> str:
    """What a library says of a broken file, which can be an error of almost any kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


READERS: dict[str, Callable[[Path, frozenset[str] | None], Iterator[Row]]] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".jsonl.gz": json_lines, ".parquet": _parquet, ".npz": _npz}
