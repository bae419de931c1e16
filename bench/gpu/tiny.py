"""Every public function on tiny shapes against float64, small enough for a memory checker: python -m gpu.tiny

Shapes cross tile borders: V prime, V one more than a tile, D that is no power of two. Exit status 1 on an error above
its limit.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch

from . import exact, layer_suites, ours
from .inputs import GivenLogits, Steps, Workload, draw
from .suite import Result, errors

SHAPES = {"cuda": ((64, 257, 48), (192, 1031, 896)), "cpu": ((64, 37, 24),)}  # (N, V, D)
# (d_out, d_in, mean length of a response): one tile with prompts shared out, and several, none of them full.
LAYERS = {"cuda": ((40, 72, 9), (520, 392, 150)), "cpu": ((24, 40, 5),)}
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.bfloat16,)}
# Log-probs have float32 accumulators: 4e-7 at V = 151936, and 1e-4 leaves room for TF32-free products in any order.
# Gradients go through one rounding of the derivatives to bf16 (2^-9) and, in a loop, of the result.
LIMITS = {"logp": 1e-4, "entropy": 1e-4, "sum_p_sq": 1e-3, "score_sq": 1e-3, "hidden_grad": 1e-2, "weight_grad": 1e-2,
          "gradients": 1e-2, "gram": 2e-2, "weights": 1e-5, "log_odds_gain": 1e-4, "alignment": 1e-4, "curvature": 1e-3}


def questions(inputs: Workload, device: torch.device) -> dict[str, tuple[Callable[[], Result], dict]]:
    """name -> (the call, what it should give)."""
    backend = {"backend": "triton"}
    given = GivenLogits.of(inputs)
    return {
        "token_stats": (lambda: ours.token_stats(inputs, **backend), exact.token_statistics(inputs)),
        "token_stats_from_logits": (lambda: ours.stats_from_logits(given), exact.row_statistics(given)),
        "hidden_grad": (lambda: ours.hidden_gradient(inputs, **backend), exact.hidden_gradient(inputs)),
        "linear_logprob": (lambda: ours.forward_backward(inputs, **backend), exact.logprob_gradients(inputs)),
        "gap logits": (lambda: ours.gap(inputs, "logits", **backend), exact.gap(inputs, "logits")),
        "gap hidden": (lambda: ours.gap(inputs, "hidden", **backend), exact.gap(inputs, "hidden")),
        "gap head": (lambda: ours.gap(inputs, "head", **backend), exact.gap(inputs, "head")),
    }


def compare(name: str, result: Result, truth: dict) -> bool:
    """Print the errors; whether all that have a limit keep it. NaN keeps none."""
    found = errors(result, truth)
    bad = [key for key, error in found.items() if key in LIMITS and not error <= LIMITS[key]]
    unwritten = [key for key, value in result.items() if value.isnan().any()]
    print(f"{name}: " + ", ".join(f"{key} {error:.1e}" for key, error in found.items())
          + (f"; above the limit: {bad}" if bad else "") + (f"; NaN in {unwritten}" if unwritten else ""), flush=True)
    return bool(found) and not bad and not unwritten


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), default="cuda")
    device = torch.device(parser.parse_args().device)
    fine = True
    for n_tokens, vocabulary, width in SHAPES[device.type]:
        for dtype in DTYPES[device.type]:
            weight = (torch.randn(vocabulary, width, device=device) / math.sqrt(width)).to(dtype)
            for name, (call, truth) in questions(draw(weight, n_tokens, "peaked", 0), device).items():
                fine &= compare(f"{n_tokens}x{vocabulary}x{width} {dtype}: {name}", call(), truth)
    for d_out, d_in, mean_length in LAYERS[device.type]:
        for dtype in DTYPES[device.type]:
            layer = layer_suites.Layer.draw(d_out, d_in, 16, mean_length, 0, device, dtype)
            fine &= compare(f"{d_out}x{d_in} of {mean_length} tokens {dtype}: {layer_suites.KERNEL}",
                            layer_suites.segmented(layer), layer_suites.exact(layer))
    batch = Steps.draw(16, 7, 0, device)
    fine &= compare("advantages + loss_weights", ours.weights(batch), exact.weights(batch))
    fine &= compare("measure_step", ours.step(batch), exact.step(batch))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
