"""Providers of rlvr_fast."""

from __future__ import annotations

from functools import partial

import torch

import rlvr_fast as rf
from rlvr_fast import backends
from rlvr_fast.bench.workload import Workload

from .inputs import GivenLogits, Steps
from .suite import Provider, Result
from .torch_peers import STATISTICS, chunk_rows, product

INTERPRETED_LOGITS = 3000  # Triton's interpreter takes a second for about ten thousand


def _fields(stats: rf.TokenStats) -> Result:
    return {name: getattr(stats, name) for name in STATISTICS}


# -- statistics --------------------------------------------------------------------------------------------------------


def token_stats(inputs: Workload, backend: str = "auto") -> Result:
    return _fields(rf.token_stats(inputs.hidden, inputs.weight, inputs.tokens, backend=backend))


def library_product_and_rows(inputs: Workload) -> Result:
    """Library products into bounded float32 logits, one pass over them per chunk."""
    parts = []
    step = chunk_rows(inputs.shape.vocabulary)
    for hidden, tokens in zip(inputs.hidden.split(step), inputs.tokens.split(step), strict=True):
        parts.append(_fields(rf.token_stats_from_logits(product(hidden, inputs.weight.T), tokens)))
    return {name: torch.cat([part[name] for part in parts]) for name in STATISTICS}


def stats_from_logits(inputs: GivenLogits) -> Result:
    return _fields(rf.token_stats_from_logits(inputs.logits, inputs.tokens))


# -- gradients ---------------------------------------------------------------------------------------------------------


def hidden_gradient(inputs: Workload, backend: str = "auto") -> Result:
    stats = rf.token_stats(inputs.hidden, inputs.weight, inputs.tokens, hidden_grad=True, backend=backend)
    return _fields(stats) | {"hidden_grad": stats.hidden_grad}


def forward_backward(inputs: Workload, backend: str = "auto") -> Result:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    logp, entropy = rf.linear_logprob(hidden, weight, inputs.tokens, backend=backend)
    gradients = torch.autograd.grad(logp, (hidden, weight), inputs.coefficients)
    return {"logp": logp.detach(), "entropy": entropy.detach(), "hidden_grad": gradients[0],
            "weight_grad": gradients[1]}


# -- gap ---------------------------------------------------------------------------------------------------------------


def gap(inputs: Workload, level: str, backend: str = "auto") -> Result:
    found = rf.gradient_gap(inputs.hidden, inputs.weight, inputs.rollouts, level=level, backend=backend)
    vectors = {"gram": torch.stack(list(found.gram))} if level == "head" else {"gradients": found.gradients.vectors}
    return vectors | {"norm_sq": found.norm_sq}


# -- no vocabulary -----------------------------------------------------------------------------------------------------


def weights(inputs: Steps) -> Result:
    return {"weights": rf.advantages_and_weights(inputs.rollouts, "grpo", "grpo")[1]}


def step(inputs: Steps) -> Result:
    measured = rf.measure_step(inputs.logp_before, inputs.logp_after, inputs.rollouts,
                               logp_reverse=inputs.logp_reverse, in_sample=False)
    return {name: getattr(measured, name) for name in ("log_odds_gain", "alignment", "curvature")}


# -- as providers ------------------------------------------------------------------------------------------------------


def providers(run, device: torch.device, **fixed) -> tuple[Provider, ...]:
    """``run`` by the Triton backend; without a GPU also by the native one, for the dry run."""
    names = ("triton",) if device.type == "cuda" else ("triton", "native")
    return tuple(Provider(f"rlvr_fast {name}", _limited(partial(run, backend=name, **fixed), name, device), "ours",
                          backends.available(device)[name]) for name in names)


def _limited(run, name: str, device: torch.device):
    """Refuse what the interpreter would take minutes for."""
    def checked(inputs: Workload) -> Result:
        if inputs.shape.n_tokens * inputs.shape.vocabulary > INTERPRETED_LOGITS:
            raise ValueError(f"more than {INTERPRETED_LOGITS} logits, Triton's interpreter is too slow")
        return run(inputs)
    return checked if name == "triton" and device.type == "cpu" else run
