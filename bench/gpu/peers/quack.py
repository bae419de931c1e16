"""QuACK 0.6.5 (CuTe DSL): linear cross-entropy with the hidden gradient in two products.

It computes the sum of the negative log-probs and unweighted gradients: no log-prob per token, entropy, Σp², score norm,
temperature or token weights. Its fast path wants Hopper, bf16 and V a multiple of 128. It needs nvidia-cutlass-dsl
(about 90 MB with its libraries), which ``bench/fetch_peers.sh --cute`` fetches.
"""

from __future__ import annotations

import importlib

import torch

from rlvr_fast.bench.workload import Workload

from ..suite import Result
from . import Answer, Peer

LACKS = "logp per token, entropy, Σp², score norm"


def _load():
    return importlib.import_module("quack.linear_cross_entropy")


def _loss(module, hidden, weight, tokens) -> torch.Tensor:
    return module.chunked_linear_cross_entropy(hidden, weight, tokens, reduction="sum")


def _statistics(module, inputs: Workload) -> Result:
    with torch.no_grad():
        return {"loss": _loss(module, inputs.hidden, inputs.weight, inputs.tokens)}


def _hidden_gradient(module, inputs: Workload) -> Result:
    hidden = inputs.hidden.detach().requires_grad_()
    loss = _loss(module, hidden, inputs.weight.detach(), inputs.tokens)
    return {"hidden_grad": -torch.autograd.grad(loss, hidden)[0]}


def _forward_backward(module, inputs: Workload) -> Result:
    """All token weights are 1, so that the gradients are not the question's."""
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    gradients = torch.autograd.grad(_loss(module, hidden, weight, inputs.tokens), (hidden, weight))
    return dict(zip(("unweighted_hidden_grad", "unweighted_weight_grad"), gradients, strict=True))


PEER = Peer("quack", "quack-kernels", _load,
            {"token_stats": Answer(_statistics, LACKS), "hidden_grad": Answer(_hidden_gradient, LACKS),
             "linear_logprob fwd+bwd": Answer(_forward_backward, f"token weights, {LACKS}")})
