"""Suites of the head: statistics of sampled tokens, per-token hidden gradients, forward and backward, the gap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from rlvr_fast.bench.workload import GROUP_SIZE, Workload

from . import exact, ours, peers, torch_peers
from .floors import product_floor
from .suite import Provider, Result, Suite


def _products(count: int, inputs: Workload) -> float:
    """FLOPs that the question requires of anybody."""
    return count * inputs.shape.product_flops


def _this_product(inputs: Workload) -> Result:
    """The bare product of the shape, to say how much of a loss the shape itself explains."""
    torch.mm(inputs.hidden, inputs.weight.T)
    return {}


SAME_SHAPE = Provider("library product of this shape", _this_product, "floor")


def token_stats(device: torch.device) -> Suite:
    chunked = Provider("rlvr_fast rows after library product", ours.library_product_and_rows, "ours")
    providers = (product_floor(device), SAME_SHAPE, *ours.providers(ours.token_stats, device), chunked,
                 *torch_peers.statistics(device), *peers.providers("token_stats", device))
    return Suite("token_stats", providers, exact.token_statistics, partial(_products, 1))


def hidden_grad(device: torch.device) -> Suite:
    providers = (product_floor(device), *ours.providers(ours.hidden_gradient, device),
                 *torch_peers.gradients(device, with_weight=False), *peers.providers("hidden_grad", device))
    return Suite("hidden_grad", providers, exact.hidden_gradient, partial(_products, 2))


def linear_logprob(device: torch.device) -> Suite:
    name = "linear_logprob fwd+bwd"
    providers = (product_floor(device), *ours.providers(ours.forward_backward, device),
                 *torch_peers.gradients(device, with_weight=True), *peers.providers(name, device))
    return Suite(name, providers, exact.logprob_gradients, partial(_products, 3))


REFERENCE = "rlvr_fast token_stats"  # the statistics pass that the gap's cost is compared with


def _gram_work(inputs: Workload) -> float:
    """One product for the scores; then the pairs of a prompt's M tokens, M/(2D) products, or the gradients, one."""
    tokens_per_prompt = GROUP_SIZE * inputs.shape.length
    return (1 + min(tokens_per_prompt / (2 * inputs.shape.width), 1.0)) * inputs.shape.product_flops


def _gap(level: str, work: Callable[[Workload], float], others: tuple[Provider, ...], device: torch.device) -> Suite:
    name = f"gradient_gap {level}"
    providers = (product_floor(device), Provider(REFERENCE, ours.token_stats, "floor"),
                 *ours.providers(ours.gap, device, level=level), *others)
    return Suite(name, providers, partial(exact.gap, level=level), work, reference=REFERENCE)


def hidden_gap(device: torch.device) -> Suite:
    others = *torch_peers.hidden_gap(device), *peers.providers("gradient_gap hidden", device)
    return _gap("hidden", partial(_products, 1), others, device)


def head_gap(device: torch.device) -> Suite:
    return _gap("head", _gram_work, torch_peers.head_gap(device), device)
