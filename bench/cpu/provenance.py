"""What a figure was measured with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions(packages: Iterable[str]) -> str:
    """Python's and the packages' versions, for one cell of a table."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return "; ".join(found)


def git_sha() -> str:
    """Of the checkout that this file is tracked in, with "-dirty" if it differs; "no checkout" for an installed one."""
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).resolve().parent, capture_output=True, text=True,
                              check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
            return "no checkout"
        return f"{git('rev-parse', 'HEAD')}{'-dirty' if git('status', '--porcelain', '--untracked-files=no') else ''}"
    except OSError:
        return "no git"
