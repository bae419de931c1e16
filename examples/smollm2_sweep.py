"""SmolLM2-135M at several learning rates, with a guard that only tells, one that scales and one that backtracks.

    python examples/smollm2_sweep.py --output docs/smollm2      # sweep.json, sweep.md, sweep.png; 20 minutes, one core

One-digit sums as in grpo_smollm2.py, all weights in float32 on the CPU, the same prompts and first rollouts in every
run. After each step the exact success rate on held-out sums is computed; it takes no part in what the guard does.
Needs the extra smollm2. Runs that sweep.json already holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from time import perf_counter

import torch
from batching import batches
from smollm2 import task
from smollm2.policy import Policy
from smollm2.sweep_report import draw, markdown

import rlvr_fast as rf
from rlvr_fast.strict_json import plain

MODES = ("warn", "scale", "backtrack")
RATES = (1e-5, 3e-5, 1e-4)
CHECK_RESPONSES = 8  # per held-out prompt, for mode "backtrack"


def main() -> None:
    options = arguments()
    path = options.output / "sweep.json"
    options.output.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    done = {(run["learning_rate"], run["mode"]) for run in runs}
    policy, start = None, None
    for rate in options.rates:
        for mode in options.modes:
            if (rate, mode) in done:
                continue
            if policy is None:
                policy = Policy()
                start = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
            policy.model.load_state_dict(start)
            runs.append({"learning_rate": rate, "mode": mode, "seed": options.seed,
                         "steps": train(policy, rate, mode, options)})
            runs.sort(key=lambda run: (run["learning_rate"], MODES.index(run["mode"])))
            path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")  # an interrupted sweep goes on
    (options.output / "sweep.md").write_text(markdown(runs), encoding="utf-8")
    draw(runs, options.output / "sweep.png")
    print(markdown(runs))


def train(policy: Policy, rate: float, mode: str, options: argparse.Namespace) -> list[dict[str, float | str | None]]:
    """One run; a dict per step."""
    generator = torch.Generator().manual_seed(options.seed)
    training, heldout = task.split(options.heldout_prompts, options.seed)
    stream = batches(training, options.prompts, options.seed)
    # share=None: measured at every step, however long that takes, so that runs can be repeated
    guard = rf.StepGuard(torch.optim.AdamW(policy.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0), mode,
                         share=None)
    success, steps = policy.success(heldout).mean().item(), []
    for step in range(1, options.steps + 1):
        began = perf_counter()
        batch = policy.sample(next(stream), options.responses, generator)
        sampled = perf_counter()
        reading = guard.observe(lambda batch=batch: policy.logp(batch), batch.rollouts)
        observed = perf_counter()
        logp, _ = rf.linear_logprob(policy.hidden(batch), policy.head, batch.rollouts.tokens)
        weights = rf.loss_weights(batch.rollouts, rf.advantages(batch.rollouts, "grpo"), "grpo")
        guard.zero_grad()
        (-(weights * logp).sum()).backward()
        checking = perf_counter()
        if mode == "backtrack":
            probe = policy.sample(heldout, CHECK_RESPONSES, generator)
            guard.check_with(lambda probe=probe: policy.logp(probe), probe.rollouts)
        checked = perf_counter()
        announced = rate > guard.break_even_rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rf.StepWarning)  # what it says is recorded
            guard.step()
        ended = perf_counter()
        before, success = success, policy.success(heldout).mean().item()
        figures = {name: plain(guard.metrics()[f"rlvr/step/guard/{name}"])
                   for name in ("scale", "break_even_rate", "backtracks", "undone")}
        steps.append({
            "step": step, "before": before, "after": success, "announced": announced,
            "training_success": batch.rollouts.correct.double().mean().item(),
            "verdict_on_last_step": None if reading is None else reading.verdict,
            "reason": None if reading is None else reading.reason, **figures,
            "seconds": {"sampling": sampled - began, "observing": observed - sampled, "training": checking - observed,
                        "checking": checked - checking, "stepping": ended - checked}})
        print(f"{rate:g} {mode:<10} step {step}: {before:.3f} → {success:.3f}, scale {guard.scale:.2f}", flush=True)
    return steps


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of AdamW")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--heldout-prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2_sweep"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
