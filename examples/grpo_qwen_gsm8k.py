"""GRPO on GSM8K with the gap, the threshold and the guard inside the loop: the setting of Suk & Duan (2025).

    python examples/grpo_qwen_gsm8k.py --steps 100                                  # Qwen2.5-Math-7B, a GPU of 141 GB
    python examples/grpo_qwen_gsm8k.py --model Qwen/Qwen2.5-Math-1.5B --lora 32     # less memory
    python examples/grpo_qwen_gsm8k.py --tiny --steps 5                             # anywhere, in a minute

Needs the extra: pip install 'rlvr-fast[gsm8k]'. Weights and problems come from the Hugging Face hub or from local
folders and files (--model, --data). ``--tiny`` takes a random Qwen2 of 100,000 weights, warmed up on the answers of
generated word problems, so that every line of this loop can be tried without a download; it says nothing about Qwen.

Per step: sample and verify responses; let the guard look at them (they show where the last step ended); back-propagate
in micro-batches; measure the gap; every ``--judge-every`` steps try the proposed update at several lengths on rollouts
of held-out problems; apply it through the guard.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from batching import batches
from gsm8k import problems as task
from gsm8k.policy import Batch, Policy
from gsm8k.table import Table

import rlvr_fast as rf

MULTIPLES = (1 / 4, 1 / 2, 1, 2, 4)


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    policy, training, held_out = tiny_setting(options) if options.tiny else real_setting(options)
    optimizer = torch.optim.AdamW(policy.parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    guard = rf.StepGuard(optimizer, mode=options.guard) if options.guard != "off" else None
    stream = batches(training, options.prompts, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    with Table() as table, (options.output / "steps.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, options.steps + 1):
            batch = policy.sample(next(stream), options.responses)
            if guard is not None:
                guard.observe(lambda batch=batch: policy.logp(batch), batch.rollouts)
            gap, grad_norm = backward(policy, optimizer, batch, options.clip_norm)
            judging = options.judge_every > 0 and (step - 1) % options.judge_every == 0
            probe = curve = None
            if judging or options.guard == "backtrack":
                probe = policy.sample(held_out[:options.held_out_prompts], options.responses)
            if judging:
                update = rf.propose(optimizer, policy.parameters)
                curve = rf.scan_step(lambda probe=probe: policy.logp(probe), policy.parameters, update, probe.rollouts,
                                     multiples=MULTIPLES, in_sample=False)
                del update
            if options.guard == "backtrack":
                guard.check_with(lambda probe=probe: policy.logp(probe), probe.rollouts)
            (optimizer if guard is None else guard).step()

            record = describe(step, options.learning_rate, batch, grad_norm, gap, probe, curve, guard)
            log.write(json.dumps(record) + "\n")
            log.flush()  # an interrupted run leaves its steps
            table.add(record)
    print(f"Written: {options.output / 'steps.jsonl'}")


def backward(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float) -> tuple[rf.Gap, float]:
    """Put the GRPO gradient of the whole batch into the parameters, micro-batch by micro-batch; the gap, for little."""
    weights = rf.loss_weights(batch.rollouts, rf.advantages(batch.rollouts, "grpo"), "grpo")
    optimizer.zero_grad()
    states = []
    for hidden, where in policy.hidden(batch):
        logp, _ = rf.linear_logprob(hidden, policy.head, batch.rollouts.tokens[where])
        (-(weights[where] * logp).sum()).backward()
        states.append(hidden.detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters, clip_norm or math.inf).item()
    return rf.gradient_gap(torch.cat(states), policy.head, batch.rollouts), grad_norm


def describe(step: int, learning_rate: float, batch: Batch, grad_norm: float, gap: rf.Gap, probe: Batch | None,
             curve: rf.StepCurve | None, guard: rf.StepGuard | None) -> dict[str, object]:
    """One line of steps.jsonl; what is not known becomes null."""
    figures = {"step": step, "learning_rate": learning_rate, "grad_norm": grad_norm,
               "success": batch.rollouts.correct.double().mean().item(),
               "length": batch.rollouts.lengths.double().mean().item(), **gap.summary()}
    if curve is not None:
        proposed = curve.multiples.index(1)
        figures |= {"held_out_success": probe.rollouts.correct.double().mean().item(), "verdict": curve.verdict,
                    "break_even": curve.success_break_even.item(), "gain": curve.success_gain[proposed].item(),
                    "gain_stderr": curve.success_gain_stderr[proposed].item()}
    if guard is not None:
        figures |= guard.metrics()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()}


def real_setting(options: argparse.Namespace) -> tuple[Policy, list[task.Problem], list[task.Problem]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear", lora_dropout=0.0))
    if options.data is not None:
        found = task.gsm8k(options.data, "train")
        training, held_out = found[:-options.held_out_prompts], found[-options.held_out_prompts:]
    else:
        training, held_out = task.gsm8k("openai/gsm8k", "train"), task.gsm8k("openai/gsm8k", "test")
    return Policy(model, tokenizer, max_new_tokens=options.max_new_tokens, micro_batch=options.micro_batch,
                  checkpointing=True), training, held_out


def tiny_setting(options: argparse.Namespace) -> tuple[Policy, list[task.Problem], list[task.Problem]]:
    from gsm8k.tiny import tiny_qwen2, warm_up

    torch.set_num_threads(1)  # a model this small gains nothing from more
    model, tokenizer = tiny_qwen2(options.seed)
    policy = Policy(model, tokenizer, max_new_tokens=12, micro_batch=options.micro_batch)
    found = task.generated(options.generated, 512 + options.held_out_prompts, options.seed)
    training, held_out = found[options.held_out_prompts:], found[:options.held_out_prompts]
    warm_up(policy, training, 60, options.seed)
    return policy, training, held_out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-Math-7B", help="name on the hub, or a local folder")
    parser.add_argument("--data", help="JSONL with columns question and answer; default: openai/gsm8k from the hub")
    parser.add_argument("--tiny", action="store_true", help="a random Qwen2 and generated problems, no download")
    parser.add_argument("--generated", default="letter_counting", help="reasoning-gym task of --tiny")
    parser.add_argument("--guard", choices=("off", "warn", "scale", "backtrack"), default="warn")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of adapters; 0: all weights")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="of AdamW")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="of the gradient; 0: none")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=64, help="training problems per step")
    parser.add_argument("--responses", type=int, default=8, help="to each of them")
    parser.add_argument("--held-out-prompts", type=int, default=64, help="problems that judge steps, never trained on")
    parser.add_argument("--judge-every", type=int, default=5, help="steps between scans on held-out rollouts; 0: never")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=16, help="responses per forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/gsm8k"))
    options = parser.parse_args()
    for name in ("steps", "prompts", "held_out_prompts", "max_new_tokens", "micro_batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.responses < 2:
        parser.error(f"--responses must be at least 2, got {options.responses}")
    for name in ("lora", "clip_norm", "judge_every"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(options, name)}")
    if not options.learning_rate > 0:
        parser.error(f"--learning-rate must be positive, got {options.learning_rate}")
    return options


if __name__ == "__main__":
    main()
