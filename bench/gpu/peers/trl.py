"""TRL 1.16: the chunked log-prob operator behind its fused lm_head, and its row kernel for given logits.

``ChunkedLogProbFunction`` multiplies into bf16 tiles of 4096 x 32768 and folds each into running statistics: log-prob,
entropy and log Σp². It lacks the score norm, which we derive from its outputs as 1 - 2p + Σp² (no digits left for
p → 1), and any gap. ``selective_log_softmax_and_entropy`` lacks Σp² and the score norm.

Only these two files are imported: ``trl.trainer.utils`` would bring datasets, pandas and accelerate for one context
manager that gathers sharded weights, which do not exist here; ``transformers`` is asked for one question that importing
triton answers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import nullcontext

import torch

from rlvr_fast.bench.workload import RESPONSES, Workload

from ..inputs import GivenLogits
from ..suite import Result
from ..torch_peers import differentiate, gap_of
from . import Answer, Peer, stand_in

CHUNK_SIZE = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


def _load():
    modules = {"trl__trainer__utils": {"maybe_gather_lm_head_ctx": lambda *parameters: nullcontext()}}
    made_up = {} if importlib.util.find_spec("transformers") else {
        "transformers": {}, "transformers__utils": {"is_triton_available": _triton_available}}
    stand_in("trl", "trainer", **modules, **made_up)
    try:
        return importlib.import_module("trl.kernels")
    finally:
        for name in made_up:  # others must not take it for the package
            del sys.modules[name.replace("__", ".")]


def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def _apply(module, outputs: tuple[str, ...], hidden, weight, tokens) -> tuple:
    return module.ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, CHUNK_SIZE, None, 1.0, outputs)


def _statistics(module, inputs: Workload) -> Result:
    outputs = "entropy", "log_sum_sq_probs"
    logp, entropy, log_sum_p_sq, *_ = _apply(module, outputs, inputs.hidden, inputs.weight, inputs.tokens)
    sum_p_sq = log_sum_p_sq.exp()
    return {"logp": logp, "entropy": entropy, "sum_p_sq": sum_p_sq, "score_sq": 1 - 2 * logp.exp() + sum_p_sq}


def _gradients(module, inputs: Workload, with_weight: bool) -> Result:
    def logp_and_entropy(*arguments):
        return _apply(module, ("entropy",), *arguments)[:2]
    return differentiate(inputs, logp_and_entropy, ("logp", "entropy"), with_weight)


def _hidden_gap(module, inputs: Workload) -> Result:
    gradient = _gradients(module, inputs, False)["hidden_grad"]
    return gap_of(gradient.float().unflatten(0, (RESPONSES, -1)).mean(1), inputs, "hidden")


def _rows(module, inputs: GivenLogits) -> Result:
    with torch.no_grad():
        logp, entropy = module.selective_log_softmax_and_entropy(inputs.logits, inputs.tokens)
    return {"logp": logp, "entropy": entropy}


def _hidden_gradient(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, False)


def _forward_backward(module, inputs: Workload) -> Result:
    return _gradients(module, inputs, True)


PEER = Peer(
    "trl", "trl", _load,
    {"token_stats": Answer(_statistics), "hidden_grad": Answer(_hidden_gradient, "Σp², score norm"),
     "linear_logprob fwd+bwd": Answer(_forward_backward), "gradient_gap hidden": Answer(_hidden_gap),
     "token_stats_from_logits": Answer(_rows, "Σp², score norm")},
    on_cpu=("token_stats", "hidden_grad", "linear_logprob fwd+bwd", "gradient_gap hidden"))
