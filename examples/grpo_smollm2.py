"""GRPO on a pretrained language model with the toolkit inside the loop: every step is judged before it is taken.

    python examples/grpo_smollm2.py --steps 3 --prompts 16 --responses 8

SmolLM2-135M-Instruct learns one-digit sums, all weights trained in float32, on the CPU. Each step

1. samples and verifies responses to training prompts, and measures their gradient gap;
2. lets Adam propose an update and tries it at several lengths on rollouts of *held-out* prompts: verdict, break-even;
3. applies it, whatever the verdict, samples the held-out prompts afresh, and asks whether going on would still help.

A sum has one right answer, whose probability is the success rate. So every estimate can be held against the truth,
which a real task would not offer; the truth takes no part in the estimates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batching import batches
from smollm2 import task
from smollm2.clock import Clock
from smollm2.plots import save_plots
from smollm2.policy import Batch, Policy
from smollm2.record import StepRecord, write_jsonl
from smollm2.report import Report, markdown, summary

import rlvr_fast as rf

MULTIPLES = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4)


def main() -> None:
    options = arguments()
    generator = torch.Generator().manual_seed(options.seed)
    training, heldout = task.split(options.heldout_prompts, options.seed)
    stream = batches(training, options.prompts, options.seed)
    with Report() as report:
        clock = Clock(report.phase)
        with clock("loading SmolLM2-135M-Instruct"):
            policy = Policy()
        optimizer = torch.optim.AdamW(policy.parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        with clock("held-out rollouts"):
            before = policy.sample(heldout, options.heldout_responses, generator)
            logp_before = policy.logp(before)
        for step in range(1, options.steps + 1):
            clock = Clock(report.phase)
            with clock("sampling"):
                batch = policy.sample(next(stream), options.responses, generator)
            with clock("training"):
                hidden, entropy = backward(policy, optimizer, batch)
                update = rf.propose(optimizer, policy.parameters)
            with clock("gap"):
                gap = rf.gradient_gap(hidden, policy.head, batch.rollouts, level="hidden")
            with clock("head gap"):  # once, to show what it costs
                head_gap = rf.gradient_gap(hidden, policy.head, batch.rollouts, level="head") if step == 1 else None

            # The step that Adam wants to take, tried on rollouts that had no part in it.
            with clock("scan"):
                curve, truth = judge(policy, update, before, logp_before, heldout, clock)
            with clock("training"):
                optimizer.step()

            # Where it led. The new rollouts judge the next step, too.
            with clock("held-out rollouts"):
                after = policy.sample(heldout, options.heldout_responses, generator)
                logp_after = policy.logp(after)
            with clock("end slope"):
                end = rf.scan_step(lambda after=after: policy.logp(after), policy.parameters, update, after.rollouts,
                                   multiples=MULTIPLES[:1], logp_before=logp_after, in_sample=False)

            report.add(StepRecord.of(step, options.learning_rate, batch.rollouts, entropy, gap, head_gap,
                                     before.rollouts, curve, truth, after.rollouts, end, clock.seconds))
            save(report.records, options.output)
            before, logp_before = after, logp_after
    report.console.print(f"\n{summary(report.records)}\n\nWritten to {options.output}/", highlight=False)


def backward(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the GRPO gradient into the parameters; hidden states [N, D] and entropies [N] of the response tokens."""
    hidden = policy.hidden(batch)
    logp, entropy = rf.linear_logprob(hidden, policy.head, batch.rollouts.tokens)
    weights = rf.loss_weights(batch.rollouts, rf.advantages(batch.rollouts, "grpo"), "grpo")
    optimizer.zero_grad()
    (-(weights * logp).sum()).backward()
    return hidden.detach(), entropy.detach()


def judge(policy: Policy, update: dict[torch.Tensor, torch.Tensor], batch: Batch, logp_before: torch.Tensor,
          heldout: list[task.Sum], clock: Clock) -> tuple[rf.StepCurve, list[float]]:
    """The update tried at all multiples, and the exact success rate at multiple 0 and at each of them."""
    def exact() -> float:
        with clock("truth"):
            return policy.success(heldout).mean().item()

    def logp() -> torch.Tensor:
        truth.append(exact())
        return policy.logp(batch)

    truth = [exact()]
    curve = rf.scan_step(logp, policy.parameters, update, batch.rollouts, multiples=MULTIPLES, logp_before=logp_before,
                         in_sample=False)
    return curve, truth


def save(records: list[StepRecord], folder: Path) -> None:
    """After every step, so that an interrupted run leaves its results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, folder / "steps.jsonl")
    (folder / "table.md").write_text(markdown(records), encoding="utf-8")
    save_plots(records, folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=16, help="training prompts per step")
    parser.add_argument("--responses", type=int, default=8, help="responses per training prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of AdamW")
    parser.add_argument("--heldout-prompts", type=int, default=32, help="prompts that judge the steps")
    parser.add_argument("--heldout-responses", type=int, default=32, help="responses to each of them")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampling")
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"), help="folder for the results")
    options = parser.parse_args()
    for name in ("steps", "prompts", "responses", "heldout_prompts", "heldout_responses"):
        if getattr(options, name) < (1 if name == "steps" else 2):
            parser.error(f"--{name.replace('_', '-')} is too small: {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
