"""cut-cross-entropy 25.1.1: the negative log-prob without logits in memory, and a filtered backward.

It computes log-probs alone: no entropy, Σp², score norm, or temperature. Its backward skips blocks of small
probabilities (``filter_eps="high"``, its default), and both passes add up under locks or by atomics, so that results
do not repeat bit for bit.
"""

from __future__ import annotations

import importlib

import torch

from rlvr_fast.bench.workload import Workload

from ..suite import Result
from ..torch_peers import differentiate
from . import Answer, Peer

LACKS = "entropy, Σp², score norm"


def _load():
    return importlib.import_module("cut_cross_entropy")


def _logp(module, hidden, weight, tokens) -> tuple[torch.Tensor]:
    return (-module.linear_cross_entropy(hidden, weight, tokens, reduction="none"),)


def _statistics(module, inputs: Workload) -> Result:
    with torch.no_grad():
        return {"logp": _logp(module, inputs.hidden, inputs.weight, inputs.tokens)[0]}


def _gradients(module, inputs: Workload, with_weight: bool) -> Result:
    def logp(*arguments):
        return _logp(module, *arguments)
    return differentiate(inputs, logp, ("logp",), with_weight)


def _hidden_gradient(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, False)


def _forward_backward(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, True)


PEER = Peer("cut-cross-entropy", "cut-cross-entropy", _load,
            {"token_stats": Answer(_statistics, LACKS),
             "hidden_grad": Answer(_hidden_gradient, f"{LACKS}; small gradients filtered"),
             "linear_logprob fwd+bwd": Answer(_forward_backward, "entropy; small gradients filtered")})
