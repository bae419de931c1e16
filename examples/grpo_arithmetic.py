"""GRPO on arithmetic with the gradient gap and the step threshold measured inside the loop.

A small transformer learns two-digit addition: a short supervised warm-up from scratch, then GRPO with verified 0/1
rewards, twice from the same warm-started model, at a safe learning rate and at one that is too large. Every update is
judged before it is applied, on rollouts that had no part in it, and then applied whatever the verdict, so that the
forecast can be held against what happened. Takes one to two minutes on one CPU core:

    python examples/grpo_arithmetic.py --output outputs/demo
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from arithmetic import task
from arithmetic.model import Policy
from arithmetic.plots import plot_runs
from arithmetic.records import Forecast, Run, StepRecord, write_jsonl
from arithmetic.report import Reporter
from arithmetic.sampling import completion_hidden, completion_logp, exact_success, sample
from arithmetic.summary import summarise
from arithmetic.warmup import warm_up
from rich.console import Console

import rlvr_fast as rf


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the two runs."""

    safe_rate: float = 5e-4
    large_rate: float = 5e-3
    safe_steps: int = 40
    large_steps: int = 24
    ramp_steps: int = 16  # the learning rate grows to its full size over these
    warm_up_success: float = 0.3
    n_held_out: int = 768  # problems for the forecasts and for the exact success rate, never trained on
    probe_group_size: int = 4
    n_prompts: int = 128
    group_size: int = 8
    multiples: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)


QUICK = Settings(safe_steps=3, large_steps=3, warm_up_success=0.1, n_held_out=128, n_prompts=32)


def train(policy: Policy, problems: torch.Tensor, held_out: torch.Tensor, name: str, learning_rate: float, n_steps: int,
          settings: Settings, seed: int, reporter: Reporter) -> Run:
    """GRPO for ``n_steps``; every update is announced, applied and held against the exact success rate."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    success = start = exact_success(policy, held_out)
    records = []
    for step in range(n_steps):
        rate = optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / settings.ramp_steps)

        # GRPO: sample, verify, weigh, back-propagate.
        batch = sample(policy, task.draw(problems, settings.n_prompts, generator), settings.group_size, generator)
        rollouts = batch.rollouts
        weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo")
        hidden = completion_hidden(policy, batch)
        logp, _ = rf.linear_logprob(hidden, policy.lm_head.weight, rollouts.tokens)
        optimizer.zero_grad()
        (-(weights * logp).sum()).backward()
        gap = rf.gradient_gap(hidden, policy.lm_head.weight, rollouts)

        # The step that Adam wants to take, judged on fresh rollouts of problems that are not trained on.
        update = rf.propose(optimizer, parameters)
        probe = sample(policy, held_out, settings.probe_group_size, generator)
        scan = rf.scan_step(lambda probe=probe: completion_logp(policy, probe), parameters, update, probe.rollouts,
                            multiples=settings.multiples, in_sample=False)
        forecast = Forecast.of(rate, gap, scan)
        reporter.announce(step, forecast, success)

        optimizer.step()
        before, success = success, exact_success(policy, held_out)
        records.append(StepRecord(name, step, forecast, before, success))
        reporter.outcome(records[-1])
    return Run(name, learning_rate, start, records)


def main() -> None:
    arguments = parse_arguments()
    settings, seed, console = arguments.settings, arguments.seed, Console(highlight=False)
    reporter = Reporter(console)
    torch.set_num_threads(1)  # a model this small gains little from a second one, and waits for it on a busy machine
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    console.rule("Supervised warm-up from scratch")
    problems, held_out = task.split_problems(settings.n_held_out, generator)
    warm = Policy(task.VOCABULARY_SIZE, task.PROMPT_LENGTH + task.MAX_ANSWER_LENGTH)
    success = warm_up(warm, problems, held_out, settings.warm_up_success, generator, reporter.warm_up)
    console.print(f"GRPO starts at a success rate of {success:.1%}")
    reporter.legend()

    runs = []
    for name, rate, n_steps in (("safe", settings.safe_rate, settings.safe_steps),
                                ("large", settings.large_rate, settings.large_steps)):
        reporter.start(f"GRPO, {name} learning rate {rate:g}")
        runs.append(train(copy.deepcopy(warm), problems, held_out, name, rate, n_steps, settings, seed + 1, reporter))

    arguments.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(arguments.output / "steps.jsonl", [record for run in runs for record in run.records])
    plot_runs(arguments.output / "grpo_arithmetic.png", runs)
    console.print()
    console.rule("What this showed")
    for sentence in summarise(*runs):
        console.print(f"- {sentence}")
    console.print(f"Written: {arguments.output / 'steps.jsonl'}, {arguments.output / 'grpo_arithmetic.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"GRPO steps of the safe run (default {Settings.safe_steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--quick", action="store_true", help="a few small steps: shows that it runs, nothing more")
    arguments = parser.parse_args()
    arguments.settings = QUICK if arguments.quick else Settings()
    if arguments.steps is not None:
        if arguments.steps < 1:
            parser.error(f"--steps must be at least 1, got {arguments.steps}")
        arguments.settings = replace(arguments.settings, safe_steps=arguments.steps)
    return arguments


if __name__ == "__main__":
    main()
