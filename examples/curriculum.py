"""Does sampling by the measured gap help? GRPO on sums of 1 to 4 digits, four ways to choose the mixture of levels.

From one warm-started transformer per seed: all levels alike; by the success rate alone, p (1 − p); by the gaps that
prompts have of their own; by the gap that the prompts of a level share. All arms of a seed have the same start, budget
of rollouts, learning rate and floor. Finished runs are kept in OUTPUT/runs.jsonl and not repeated; about six minutes in
all on one free CPU core:

    python examples/curriculum.py --output docs/curriculum
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from curriculum import verdicts
from curriculum.plots import plot
from curriculum.records import Runs
from curriculum.summary import summarise, write_json
from curriculum.training import ARMS, QUICK, Settings, run_record, start, train
from rich.console import Console


def main() -> None:
    arguments = parse_arguments()
    settings, console = arguments.settings, Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    if arguments.verdicts:
        for line in verdicts.table():
            console.print(line)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.output / "runs.jsonl", settings)
    for seed in range(arguments.seeds):
        missing = [arm for arm in ARMS if (seed, arm) not in runs]
        if not missing:
            continue
        data, policy, warm_up_steps = start(seed, settings)
        rates = _percent(data.success(policy))
        console.print(f"seed {seed}: warm-up of {warm_up_steps} steps, success by level {rates}")
        for arm in missing:
            records = train(data, policy, arm, seed, settings)
            runs.add(run_record(seed, arm, settings, warm_up_steps, records))
            console.print(f"  {arm:>10}: {_percent(records[-1]['success'])} after {records[-1]['rollouts']} rollouts")
    chosen = runs.of(range(arguments.seeds))
    plot(arguments.output / "curriculum.png", chosen)
    write_json(arguments.output / "curriculum.json", chosen, settings)
    for line in summarise(chosen):
        console.print(line)


def _percent(rates: list[float]) -> str:
    return " ".join(f"{rate:.1%}" for rate in rates)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="number of seeds (default 5; 2 with --quick)")
    parser.add_argument("--steps", type=int, help=f"GRPO steps of a run (default {Settings.n_steps})")
    parser.add_argument("--output", type=Path, default=Path("outputs/curriculum"))
    parser.add_argument("--verdicts", action="store_true",
                        help="instead: how often verdicts are right where the truth is known")
    parser.add_argument("--quick", action="store_true", help="a few small steps: shows that it runs, nothing more")
    arguments = parser.parse_args()
    arguments.settings = QUICK if arguments.quick else Settings()
    arguments.seeds = (2 if arguments.quick else 5) if arguments.seeds is None else arguments.seeds
    if arguments.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an error bar, got {arguments.seeds}")
    if arguments.steps is not None:
        if arguments.steps < arguments.settings.window or arguments.steps % arguments.settings.window:
            parser.error(f"--steps must be a multiple of {arguments.settings.window}, got {arguments.steps}")
        arguments.settings = replace(arguments.settings, n_steps=arguments.steps)
    return arguments


if __name__ == "__main__":
    main()
