"""Does a step that is too large show before it is applied? GRPO at learning rates over two decades.

Small transformers learn chained sums of several lengths: a supervised warm-up from scratch, then GRPO with verified 0/1
rewards, at 7 learning rates from 5 seeds each. Every update is measured before it is applied, on rollouts that had no
part in it, and held against the exact success rate. Written are

    OUTPUT/runs/*.pt       the log of each run; a run that is there is not run again
    FIGURES/steps.json     every step of every run, by the estimators as they are now
    FIGURES/sweep.json     the numbers that docs/thresholds.md quotes
    FIGURES/*.png

The full sweep takes about 25 minutes on one CPU core, --quick less than a minute:

    python examples/step_size_sweep.py --output outputs/thresholds --figures docs/thresholds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from step_sizes.figures import draw
from step_sizes.grid_check import check_grid
from step_sizes.guarded import train_guarded
from step_sizes.log import read_log, write_log
from step_sizes.replay import replay
from step_sizes.report import show
from step_sizes.settings import QUICK, RunSettings, Sweep
from step_sizes.start import prepare
from step_sizes.store import read_runs, write_numbers, write_runs
from step_sizes.summary import summarise
from step_sizes.training import train


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    if arguments.check_grid:
        torch.set_num_threads(1)
        chosen = [settings for settings in arguments.runs if settings.guard == "off"]
        console.print("coarse over fine break-even:", check_grid(chosen, arguments.output / "warm"))
        return
    stored = arguments.figures / "steps.json"
    if not arguments.plot_only:
        torch.set_num_threads(1)  # a model this small gains nothing from a second one
        for settings in arguments.runs:
            perform(settings, arguments.output, console)
        if arguments.run_only:
            return
        found = [path for settings in arguments.sweep.runs() if (path := log_path(settings, arguments.output)).exists()]
        arguments.figures.mkdir(parents=True, exist_ok=True)
        write_runs(stored, [replay(read_log(path)) for path in found])
    runs = read_runs(stored)
    summary = summarise(runs)
    write_numbers(arguments.figures / "sweep.json", summary)
    show(summary, console)
    for path in draw(arguments.figures, runs):
        console.print(f"Written: {path}")


def perform(settings: RunSettings, output: Path, console: Console) -> None:
    path = log_path(settings, output)
    if not path.exists():
        perform_one = train if settings.guard == "off" else train_guarded
        log = perform_one(*prepare(settings, output / "warm"), settings)
        write_log(path, log)
        console.print(f"{settings.name}: success {log.steps[0].before:.3f} → {log.steps[-1].after:.3f}")


def log_path(settings: RunSettings, output: Path) -> Path:
    return output / "runs" / f"{settings.name}.pt"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/thresholds"), help="where the logs go")
    parser.add_argument("--figures", type=Path, help="where figures and numbers go (default: --output)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="run only these response lengths")
    parser.add_argument("--guards", nargs="+", choices=("off", "scale", "backtrack"), help="run only these modes")
    parser.add_argument("--rates", type=float, nargs="+", help="run only learning rates within 1 %% of these")
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these")
    parser.add_argument("--quick", action="store_true", help="a few small runs: shows that it runs, nothing more")
    parser.add_argument("--run-only", action="store_true", help="draw nothing: for a part of the sweep")
    parser.add_argument("--plot-only", action="store_true", help="draw what steps.json holds, run nothing")
    parser.add_argument("--check-grid", action="store_true",
                        help="instead, hold the true break-evens of the chosen runs against those on a finer grid")
    arguments = parser.parse_args()
    arguments.sweep = QUICK if arguments.quick else Sweep()
    arguments.figures = arguments.figures or arguments.output
    arguments.runs = [settings for settings in arguments.sweep.runs()
                      if arguments.lengths is None or settings.length in arguments.lengths
                      if arguments.guards is None or settings.guard in arguments.guards
                      if arguments.rates is None or any(abs(settings.learning_rate / rate - 1) < 0.01
                                                        for rate in arguments.rates)
                      if arguments.seeds is None or settings.seed in arguments.seeds]
    if not arguments.runs:
        parser.error("--lengths, --guards, --rates and --seeds leave no run; the sweep has lengths "
                     f"{', '.join(str(n + 1) for n in arguments.sweep.n_totals)}, rates "
                     f"{', '.join(f'{rate:.3g}' for rate in arguments.sweep.learning_rates)} and seeds below "
                     f"{arguments.sweep.n_seeds}")
    return arguments


if __name__ == "__main__":
    main()
