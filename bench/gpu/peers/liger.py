"""Liger-Kernel 0.8.5, Triton: fused linear cross-entropy in chunks of library products.

It computes log-probs alone: no entropy, Σp² or score norm. The number of valid tokens is fetched from the device in
every call. Its chunks hold N·D logits at a time in bf16. With reduction "none" its backward recomputes the logits.
The CuTe DSL implementation, which the inner cross-entropy and ``LigerFusedLinearScaledCrossEntropyFunction`` take on
Hopper, needs nvidia-cutlass-dsl and is no provider here; ``ce_impl=None`` below keeps the Triton kernel.
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
    return importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")


def _loss(module, reduction: str, hidden, weight, tokens) -> torch.Tensor:
    function = module.LigerFusedLinearCrossEntropyFunction
    return function.apply(hidden, weight, tokens, None, None, -100, 0.0, 0.0, reduction)[0]


def _statistics(module, inputs: Workload) -> Result:
    with torch.no_grad():
        return {"logp": -_loss(module, "none", inputs.hidden, inputs.weight, inputs.tokens)}


def _hidden_gradient(module, inputs: Workload) -> Result:
    """Reduction "sum", whose gradients are made during the forward; the weight's are not asked for."""
    hidden = inputs.hidden.detach().requires_grad_()
    loss = _loss(module, "sum", hidden, inputs.weight.detach(), inputs.tokens)
    return {"hidden_grad": -torch.autograd.grad(loss, hidden)[0]}


def _forward_backward(module, inputs: Workload) -> Result:
    def logp(*arguments):
        return (-_loss(module, "none", *arguments),)
    return differentiate(inputs, logp, ("logp",), True)


PEER = Peer("liger (Triton)", "liger-kernel", _load,
            {"token_stats": Answer(_statistics, LACKS), "hidden_grad": Answer(_hidden_gradient, f"logp, {LACKS}"),
             "linear_logprob fwd+bwd": Answer(_forward_backward, "entropy")})
