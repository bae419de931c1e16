"""Files that are replaced all at once: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str) -> None:
    """Write ``content`` as UTF-8 beside ``path``, then put it in its place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode("utf-8"))
    os.replace(partial, path)
