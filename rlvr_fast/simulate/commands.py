"""Command line: ``rlvr-fast simulate NAME --output DIR``, also ``python -m rlvr_fast.simulate NAME``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from rlvr_fast.command_line import EXIT_CODES, Commands, progress, require, writable_folder

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Reproduce the theory on problems whose truth is known exactly.", epilog=EXIT_CODES)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for NAME.png and NAME.json; made if missing.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Independent repetitions; each experiment has its default.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small version, in seconds.")]
Json = Annotated[bool, typer.Option("--json", help="What NAME.json holds on stdout, and nothing else there.")]


def _run(name: str, output: Path, seeds: int | None, quick: bool, as_json: bool) -> None:
    require("simulate")
    folder = writable_folder(output)
    experiment = importlib.import_module(f"rlvr_fast.simulate.{name}")
    with progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), quiet=as_json) as bar:
        bar.add_task(f"simulate {name.rpartition('.')[2]}", total=None)
        report = experiment.run(quick=quick, **({} if seeds is None else {"seeds": seeds}))
        picture, record = report.write(folder)
    if as_json:
        sys.stdout.write(record.read_text(encoding="utf-8"))
        return
    report.show()
    for path in (picture, record):
        typer.echo(f"wrote {path}")


@app.command()
def threshold(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Success after one and after many steps against the step's length, with every threshold marked."""
    _run("threshold", output, seeds, quick, as_json)


@app.command()
def collapse(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Above the break-even, success falls at every step although the direction is perfect."""
    _run("collapse", output, seeds, quick, as_json)


@app.command()
def scaling(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """How the break-even shrinks with response length and with the failure rate; what 1/T does."""
    _run("scaling", output, seeds, quick, as_json)


@app.command()
def stagnation(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Which update rules stall below the best success at a fixed rate, and an adaptive rate that does not."""
    _run("stagnation", output, seeds, quick, as_json)


@app.command()
def coverage(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Bias, spread and interval coverage of the sampled figures, and how often the verdict is right."""
    _run("coverage", output, seeds, quick, as_json)


@app.command()
def step_meter(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Which estimator finds peak and break-even of a training step from 64 prompts x 8 rollouts."""
    _run("step_meter", output, seeds, quick, as_json)


@app.command()
def relay(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """Mixtures of horizons: success, gap and share of the gradient per level, and who wakes whom."""
    _run("relay", output, seeds, quick, as_json)


@app.command()
def plateau(output: Output, seeds: Seeds = None, quick: Quick = False, as_json: Json = False) -> None:
    """How long a harder level waits for its turn, against the difficulty ratio and the size of the group."""
    _run("relay.plateau", output, seeds, quick, as_json)
