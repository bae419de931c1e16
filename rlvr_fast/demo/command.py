"""The command behind ``rlvr-fast demo``: both runs live on stdout, or as JSON; a record and a figure in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from rlvr_fast.command_line import print_json, writable_folder
from rlvr_fast.demo.grpo import QUICK, Settings, safe_and_large
from rlvr_fast.demo.plots import plot_runs
from rlvr_fast.demo.records import Run, write_jsonl
from rlvr_fast.demo.report import Reporter
from rlvr_fast.demo.summary import collapse_step, summarise


def run(output: Path, *, seed: int, steps: int | None, quick: bool, as_json: bool) -> None:
    """Train, print and write ``output``/steps.jsonl and grpo_arithmetic.png.

    Args:
        steps: of the safe run, if not its own number.

    Raises:
        OSError: ``output`` cannot be made or written into.
    """
    settings = QUICK if quick else Settings()
    if steps is not None:
        settings = replace(settings, safe_steps=steps)
    folder = writable_folder(output)
    console = Console(highlight=False, quiet=as_json)
    with _one_thread():
        runs = safe_and_large(settings, seed, Reporter(console))

    files = {"steps": folder / "steps.jsonl", "figure": folder / "grpo_arithmetic.png"}
    write_jsonl(files["steps"], [record for run in runs for record in run.records])
    plot_runs(files["figure"], runs)
    if as_json:
        print_json(_content(runs, settings, seed, files))
        return
    console.print()
    console.rule("What this showed")
    for sentence in summarise(*runs):
        console.print(f"- {sentence}")
    console.print(f"Written: {', '.join(map(str, files.values()))}", soft_wrap=True, markup=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains little from a second thread, and waits for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _content(runs: Sequence[Run], settings: Settings, seed: int, files: dict[str, Path]) -> dict[str, object]:
    return {
        "seed": seed,
        "settings": asdict(settings),
        "runs": [{"name": run.name, "learning_rate": run.learning_rate, "success_at_start": run.start,
                  "success_at_end": run.records[-1].exact_after, "collapsed_after_step": collapse_step(run),
                  "steps": [record.flat() for record in run.records]} for run in runs],
        "summary": summarise(*runs),
        "files": {name: str(path) for name, path in files.items()},
    }
