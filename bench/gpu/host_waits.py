"""Whether the public functions make the host wait for the device, which torch can turn into an error."""

from __future__ import annotations

from collections.abc import Callable

import torch

import rlvr_fast as rf

from . import ours
from .inputs import HEADS, GivenLogits, Steps, draw, head_weight
from .table import Case, Table

METRIC = "calls without a host wait"


def report_waits(table: Table, device: torch.device, head: str, n_tokens: int, steps: tuple[int, int]) -> None:
    """One row per function: 1 if it runs without a wait, 0 with torch's words if not."""
    width, vocabulary = HEADS[head]
    workload = draw(head_weight(head, device, torch.bfloat16), n_tokens, "peaked", 0)
    batch = Steps.draw(*steps, 0, device)
    calls = {
        "token_stats": (ours.token_stats, workload), "gradient_gap hidden": (_hidden_gap, workload),
        "gradient_gap head": (_head_gap, workload), "hidden_grad": (ours.hidden_gradient, workload),
        "linear_logprob fwd+bwd": (ours.forward_backward, workload),
        "token_stats_from_logits": (ours.stats_from_logits, GivenLogits.of(workload)),
        "advantages + loss_weights": (ours.weights, batch), "advantages + loss_weights, two calls": (_two_calls, batch),
        "measure_step": (ours.step, batch),
    }
    for name, (call, inputs) in calls.items():
        kernel, _, variant = name.partition(", ")
        shape = f"{steps[0]}x{steps[1]}" if isinstance(inputs, Steps) else f"{n_tokens}x{vocabulary}x{width}"
        case = Case(kernel, shape, "float32" if isinstance(inputs, Steps) else "bfloat16", "peaked")
        verdict, note = _without_wait(call, inputs, device)
        table.add(case, f"rlvr_fast {variant}".strip(), METRIC, verdict, note=note)


def _hidden_gap(inputs) -> dict:
    return ours.gap(inputs, "hidden")


def _head_gap(inputs) -> dict:
    return ours.gap(inputs, "head")


def _two_calls(inputs: Steps) -> dict:
    return {"weights": rf.loss_weights(inputs.rollouts, rf.advantages(inputs.rollouts, "grpo"), "grpo")}


def _without_wait(call: Callable, inputs, device: torch.device) -> tuple[float | None, str]:
    """Called once before, since compiling waits."""
    call(inputs)
    if device.type != "cuda":
        return None, "no GPU, called without the check"
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(inputs)
    except RuntimeError as error:
        return 0.0, str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 1.0, ""
