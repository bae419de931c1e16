"""The measuring stages, each of a few minutes: python -m gpu.stages --out DIR --stage NAME ...

Writes DIR/NAME.csv row by row. What the time did not allow is in the CSV as "not measured".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import head_suites, layer_suites, row_suites
from .clock import Clock, clock_for
from .floors import ceilings
from .host_waits import report_waits
from .inputs import HEADS, LOGITS, N_INPUT_SETS, GivenLogits, Steps, draw, head_weight
from .measure import measure
from .suite import Suite
from .table import Case, Table

# The most telling first: a stage that runs out of time has lost the least.
SHAPES = (("qwen2.5-7b", 8192), ("qwen2.5-0.5b", 8192), ("qwen2.5-1.5b", 8192), ("llama-3-8b", 8192),
          ("qwen2.5-7b", 2048), ("qwen2.5-7b", 32768))
FEW_SHAPES = SHAPES[:2]  # for suites of many products
DRY_SHAPES = (("tiny", 64),)
STEPS = {"cuda": (8192, 4096), "cpu": (64, 8)}  # responses, tokens of each: 0.13 GB of float32 weights on a GPU


@dataclass(frozen=True)
class Run:
    """What every stage is told.

    Attributes:
        n_sets: input sets that take turns.
        shapes: (head, tokens) asked for, or None for the stage's own choice.
        seconds: a stage begins nothing that would not end within this many seconds, judged by its longest case so far.
    """

    device: torch.device
    clock: Clock
    out: Path
    git_sha: str
    rounds: int
    n_sets: int
    seconds: float
    logits: tuple[str, ...]
    shapes: tuple[tuple[str, int], ...] | None
    without: tuple[str, ...]

    def table(self, stage: str) -> Table:
        return Table(self.out / f"{stage}.csv", self.device, self.git_sha)

    def shapes_or(self, choice: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return self.shapes or (choice if self.device.type == "cuda" else DRY_SHAPES)


class Deadline:
    """Whether another case fits."""

    def __init__(self, seconds: float):
        self.end, self.longest = time.monotonic() + seconds, 0.0

    def allows_another(self) -> bool:
        return time.monotonic() + 1.2 * self.longest < self.end

    @contextmanager
    def case(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.longest = max(self.longest, time.monotonic() - start)


def _run_cases(run: Run, table: Table, cases: Iterator[tuple[Suite, Case, Callable[[], list[Any]]]]) -> None:
    deadline = Deadline(run.seconds)
    for suite, case, inputs in cases:
        where = f"{case.kernel}, {case.shape} {case.logits}"
        if not deadline.allows_another():
            print(f"{where}: not measured, out of time", flush=True)
            table.add(case, "all", "milliseconds", note="not measured: out of time")
            continue
        print(f"{where} ...", flush=True)
        with deadline.case():
            measure(suite.without(run.without), case, inputs(), table, run.clock, run.device, run.rounds)


def _head_cases(run: Run, suites: tuple[tuple[Callable[[torch.device], Suite], tuple], ...]) -> Iterator[tuple]:
    """Every suite on its shapes, head by head, so that a weight is made once."""
    for make, choice in suites:
        suite, weight, made = make(run.device), None, None
        for head, n_tokens in run.shapes_or(choice):
            if made != head:
                weight = None
                weight, made = head_weight(head, run.device, torch.bfloat16), head
            width, vocabulary = HEADS[head]
            for logits in run.logits:
                case = Case(suite.name, f"{n_tokens}x{vocabulary}x{width}", "bfloat16", logits)
                yield suite, case, partial(_drawn, weight, n_tokens, logits, run.n_sets)


def _drawn(weight: torch.Tensor, n_tokens: int, logits: str, n_sets: int) -> list[Any]:
    return [draw(weight, n_tokens, logits, index) for index in range(n_sets)]


# -- stages ------------------------------------------------------------------------------------------------------------


def run_ceilings(run: Run) -> None:
    table = run.table("ceilings")
    for suite in ceilings(run.device):
        case = Case(suite.name, suite.providers[0].name, "bfloat16" if "product" in suite.name else "float32", "random")
        measure(suite, case, [None], table, run.clock, run.device, 3 * run.rounds)


def run_statistics(run: Run) -> None:
    _run_cases(run, run.table("statistics"), _head_cases(run, ((head_suites.token_stats, SHAPES),)))


def run_gap(run: Run) -> None:
    suites = (head_suites.hidden_gap, FEW_SHAPES), (head_suites.head_gap, FEW_SHAPES)
    _run_cases(run, run.table("gap"), _head_cases(run, suites))


def run_gradient(run: Run) -> None:
    suites = (head_suites.hidden_grad, FEW_SHAPES), (head_suites.linear_logprob, FEW_SHAPES)
    _run_cases(run, run.table("gradient"), _head_cases(run, suites))


def run_rows(run: Run) -> None:
    table = run.table("rows")
    _run_cases(run, table, _row_cases(run))
    report_waits(table, run.device, *run.shapes_or(FEW_SHAPES)[-1], STEPS[run.device.type])


def _row_cases(run: Run) -> Iterator[tuple]:
    given = row_suites.stats_from_logits(run.device)
    for _, case, inputs in _head_cases(run, ((row_suites.stats_from_logits, FEW_SHAPES),)):
        yield given, case, lambda inputs=inputs: [GivenLogits.of(workload) for workload in inputs()]
    n_responses, length = STEPS[run.device.type]
    for make in (row_suites.advantages, row_suites.measure_step):
        suite = make(run.device)
        case = Case(suite.name, f"{n_responses}x{length}", "float32", "none")
        yield suite, case, lambda: [Steps.draw(n_responses, length, i, run.device) for i in range(run.n_sets)]


def run_layers(run: Run) -> None:
    """Layers of their own: ``--heads``, ``--tokens`` and ``--logits`` are of the other stages."""
    suite, device = layer_suites.suite(run.device), run.device
    cases = ((suite, Case(suite.name, layer_suites.shape_of(case), "bfloat16", "none"),
              layer_suites.inputs_of(case, run.n_sets, device)) for case in layer_suites.CASES[device.type])
    _run_cases(run, run.table("layers"), cases)


STAGES = {"ceilings": run_ceilings, "statistics": run_statistics, "gap": run_gap, "gradient": run_gradient,
          "rows": run_rows, "layers": run_layers}


def main(arguments: list[str] | None = None) -> int:
    run, names = _options(arguments)
    for name in names:
        print(f"== {name}", flush=True)
        STAGES[name](run)
    return 0


def _options(arguments: list[str] | None) -> tuple[Run, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on a shape that means nothing")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), help="instead of each stage's own choice of shapes")
    parser.add_argument("--tokens", nargs="+", type=int, help="multiples of 64; with --heads, default 8192")
    parser.add_argument("--logits", nargs="+", choices=LOGITS, default=list(LOGITS))
    parser.add_argument("--rounds", type=int,
                        help=f"default 15, dry run 2; the {N_INPUT_SETS} input sets (dry run: 1) take turns")
    parser.add_argument("--seconds", type=float, default=480.0, help="of a stage; what does not fit is said")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out providers so beginning")
    parser.add_argument("--git-sha", default="unknown")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run goes through everything else")
    if options.tokens and not options.heads:
        parser.error("--tokens needs --heads")
    if any(count < 64 or count % 64 for count in options.tokens or ()):
        parser.error(f"--tokens must be multiples of 64, got {options.tokens}")
    shapes = tuple((head, count) for head in options.heads or () for count in options.tokens or (8192,))
    rounds = options.rounds if options.rounds is not None else 2 if options.dry_run else 15
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    n_sets = 1 if options.dry_run else N_INPUT_SETS
    run = Run(device, clock_for(device), options.out, options.git_sha, rounds, n_sets, options.seconds,
              tuple(options.logits), shapes or None, tuple(options.without))
    return run, options.stage


if __name__ == "__main__":
    sys.exit(main())
