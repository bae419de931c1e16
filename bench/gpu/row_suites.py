"""Suites bound by memory: statistics of given logits, advantages with loss weights, measure_step."""

from __future__ import annotations

import torch

from . import exact, ours, peers, torch_peers
from .floors import copy_floor
from .inputs import GivenLogits, Steps
from .suite import Provider, Suite


def stats_from_logits(device: torch.device) -> Suite:
    """Every logit read once."""
    name = "token_stats_from_logits"
    providers = (copy_floor(device), Provider("rlvr_fast", ours.stats_from_logits, "ours"), *torch_peers.rows(device),
                 *peers.providers(name, device))
    return Suite(name, providers, exact.row_statistics, _logits_bytes, unit="TB/s")


def _logits_bytes(inputs: GivenLogits) -> float:
    return float(inputs.logits.numel() * inputs.logits.element_size())


def advantages(device: torch.device) -> Suite:
    """One float32 weight written per token."""
    providers = copy_floor(device), Provider("rlvr_fast", ours.weights, "ours"), *torch_peers.advantages(device)
    return Suite("advantages + loss_weights", providers, exact.weights, lambda inputs: 4.0 * inputs.rollouts.n_tokens,
                 unit="TB/s")


def measure_step(device: torch.device) -> Suite:
    """Three float32 log-probs read per token."""
    providers = copy_floor(device), Provider("rlvr_fast", ours.step, "ours"), *torch_peers.steps(device)
    return Suite("measure_step", providers, exact.step, _step_bytes, unit="TB/s")


def _step_bytes(inputs: Steps) -> float:
    return 12.0 * inputs.rollouts.n_tokens
