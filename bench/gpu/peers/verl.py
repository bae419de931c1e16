"""verl 0.9.1: its Triton kernels for log-prob and entropy with their backward.

It lacks Σp² and the score norm. The backward always makes the weight gradient too, so that it answers the question of
the hidden gradient by doing more than asked. D must be a multiple of 128. Entropy is lse - E[z], which loses digits
where the policy is nearly certain.

Importing ``verl`` brings ray; ``verl.utils.device`` here is a stand-in that answers for torch.cuda.
"""

from __future__ import annotations

import importlib

import torch

from rlvr_fast.bench.workload import Workload

from ..suite import Result
from ..torch_peers import differentiate
from . import Answer, Peer, stand_in


def _load():
    device = {"is_cuda_available": torch.cuda.is_available(), "get_device_name": lambda: "cuda",
              "get_device_capability": torch.cuda.get_device_capability, "get_torch_device": lambda: torch.cuda}
    stand_in("verl", "utils", verl__utils__device=device)
    importlib.import_module("verl.utils.kernel.kernels")
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy")


def _statistics(module, inputs: Workload) -> Result:
    with torch.no_grad():
        logp, entropy = module.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.tokens, 1.0, "none")
    return {"logp": logp, "entropy": entropy}


def _gradients(module, inputs: Workload, with_weight: bool) -> Result:
    def logp_and_entropy(hidden, weight, tokens):
        return module.linear_cross_entropy(hidden, weight, tokens, 1.0, "none")
    return differentiate(inputs, logp_and_entropy, ("logp", "entropy"), with_weight)


def _hidden_gradient(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, False)


def _forward_backward(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, True)


PEER = Peer("verl", "verl", _load,
            {"token_stats": Answer(_statistics, "Σp², score norm"),
             "hidden_grad": Answer(_hidden_gradient, "Σp², score norm; makes the weight gradient besides"),
             "linear_logprob fwd+bwd": Answer(_forward_backward)})
