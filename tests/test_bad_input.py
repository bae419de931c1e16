"""What the head's functions refuse, by which error and under which name. Rollouts have their own table."""

from __future__ import annotations

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast import gap_from_gradients

N, V, D, R, T = 6, 5, 3, 3, 2
HIDDEN, WEIGHT, TOKENS, BIAS = torch.ones(N, D), torch.ones(V, D), torch.arange(N) % V, torch.zeros(V)
ROLLOUTS = rf.Rollouts.from_padded(TOKENS.view(R, T), None, torch.tensor([1.0, 0.0, 1.0]), group_size=R)
NAN, INF = float("nan"), float("inf")


def changed(tensor: torch.Tensor, value: float, position: int = 0) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1)[position] = value
    return copy


def stats(hidden=HIDDEN, weight=WEIGHT, tokens=TOKENS, **options):
    return rf.token_stats(hidden, weight, tokens, **options)


def logprob(hidden=HIDDEN, weight=WEIGHT, tokens=TOKENS, **options):
    return rf.linear_logprob(hidden, weight, tokens, **options)


def gap(hidden=HIDDEN, weight=WEIGHT, rollouts=ROLLOUTS, **options):
    return rf.gradient_gap(hidden, weight, rollouts, **options)


HEAD_CALLS = {"token_stats": stats, "linear_logprob": logprob, "gradient_gap": gap}
REFUSED_BY_ALL = {  # arguments that the three functions share
    "hidden not a tensor": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "hidden None": ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    "hidden float64": ({"hidden": HIDDEN.double()}, TypeError, "hidden must have dtype float32, .*float64"),
    "hidden integer": ({"hidden": HIDDEN.long()}, TypeError, "hidden must have dtype .*int64"),
    "hidden NaN": ({"hidden": changed(HIDDEN, NAN)}, ValueError, "hidden must be finite"),
    "hidden infinite": ({"hidden": changed(HIDDEN, -INF)}, ValueError, "hidden must be finite"),
    "weight not a tensor": ({"weight": [[1.0] * D] * V}, TypeError, "weight must be a torch.Tensor, got list"),
    "weight module": ({"weight": torch.nn.Linear(D, V)}, TypeError, "weight must be a torch.Tensor, got Linear"),
    "weight shape": ({"weight": WEIGHT[0]}, ValueError, r"weight must have 2 dimension.*\[3\]"),
    "weight width": ({"weight": WEIGHT.T.contiguous()}, ValueError, r"weight must be .* with D = 3 .*\[3, 5\]"),
    "weight without rows": ({"weight": WEIGHT[:0]}, ValueError, "weight must be .* V, D >= 1"),
    "weight dtype": ({"weight": WEIGHT.bfloat16()}, TypeError, "hidden and weight must have one dtype"),
    "weight float64": ({"weight": WEIGHT.double()}, TypeError, "weight must have dtype"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu"),
    "weight NaN": ({"weight": changed(WEIGHT, NAN)}, ValueError, "weight and bias must give finite logits"),
    "weight infinite": ({"weight": changed(WEIGHT, INF)}, ValueError, "weight and bias must give finite logits"),
    "bias not a tensor": ({"bias": [0.0] * V}, TypeError, "bias must be a torch.Tensor"),
    "bias number": ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
    "bias shape": ({"bias": BIAS[:-1]}, ValueError, r"bias must have shape \[5\]"),
    "bias integer": ({"bias": BIAS.long()}, TypeError, "bias must have dtype"),
    "bias device": ({"bias": BIAS.to("meta")}, ValueError, "bias must be on cpu"),
    "bias NaN": ({"bias": changed(BIAS, NAN)}, ValueError, "weight and bias must give finite logits"),
    "bias infinite": ({"bias": changed(BIAS, INF)}, ValueError, "weight and bias must give finite logits"),
    "sampled token out": ({"bias": changed(BIAS, -INF)}, ValueError, "every sampled token a probability above 0"),
    "sampled token out, capped": ({"bias": changed(BIAS, -INF), "softcap": 2.0}, ValueError, "probability above 0"),
    "temperature zero": ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
    "temperature negative": ({"temperature": -0.5}, ValueError, "temperature must be positive, got -0.5"),
    "temperature NaN": ({"temperature": NAN}, ValueError, "temperature must be finite, got nan"),
    "temperature infinite": ({"temperature": INF}, ValueError, "temperature must be finite, got inf"),
    "temperature text": ({"temperature": "1"}, TypeError, "temperature must be a number, got str: '1'"),
    "temperature None": ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    "temperature bool": ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    "temperature tensor": ({"temperature": torch.ones(2)}, TypeError, "temperature must be a number, got Tensor"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    "softcap negative": ({"softcap": -30.0}, ValueError, "softcap must be positive, got -30.0"),
    "softcap infinite": ({"softcap": INF}, ValueError, "softcap must be finite"),
    "softcap text": ({"softcap": "30"}, TypeError, "softcap must be a number"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend must be one of auto, torch, native, triton.*'cuda'"),
    "backend None": ({"backend": None}, TypeError, "backend must be a string"),
}
TOKEN_CALLS = {"token_stats": stats, "linear_logprob": logprob}
REFUSED_TOKENS = {
    "not a tensor": ({"tokens": [0] * N}, TypeError, "tokens must be a torch.Tensor, got list"),
    "None": ({"tokens": None}, TypeError, "tokens must be a torch.Tensor, got NoneType"),
    "float": ({"tokens": TOKENS.float()}, TypeError, "tokens must have dtype"),
    "bool": ({"tokens": TOKENS.bool()}, TypeError, "tokens must have dtype"),
    "shape": ({"tokens": TOKENS[:-1]}, ValueError, r"tokens must have shape \[6\]"),
    "rank": ({"tokens": TOKENS[:, None]}, ValueError, r"tokens must have shape \[6\], got .*\[6, 1\]"),
    "device": ({"tokens": TOKENS.to("meta")}, ValueError, "tokens must be on cpu"),
    "negative": ({"tokens": changed(TOKENS, -1, 4)}, ValueError, r"tokens must be in \[0, V\).*got -1 at position 4"),
    "label": ({"tokens": changed(TOKENS, -100)}, ValueError, r"tokens must be in \[0, V\).*got -100 at position 0"),
    "beyond": ({"tokens": changed(TOKENS, V, 2)}, ValueError, r"tokens must be in \[0, V\) with V = 5, got 5 .*2"),
}


@pytest.mark.parametrize("case", REFUSED_BY_ALL)
@pytest.mark.parametrize("function", HEAD_CALLS)
def test_head_arguments(function, case):
    options, error, message = REFUSED_BY_ALL[case]
    with pytest.raises(error, match=message):
        HEAD_CALLS[function](**options)


@pytest.mark.parametrize("case", REFUSED_TOKENS)
@pytest.mark.parametrize("function", TOKEN_CALLS)
def test_tokens(function, case):
    options, error, message = REFUSED_TOKENS[case]
    with pytest.raises(error, match=message):
        TOKEN_CALLS[function](**options)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("level", ["logits", "hidden", "head"])
def test_no_backend_lets_nan_through(backend, level):
    for options in ({"weight": changed(WEIGHT, NAN, 13)}, {"bias": changed(BIAS, NAN, 4)}):
        with pytest.raises(ValueError, match="finite logits"):
            gap(level=level, backend=backend, **options)
        with pytest.raises(ValueError, match="finite logits"):
            stats(backend=backend, **options)


from_logits, from_logprobs = rf.token_stats_from_logits, rf.token_stats_from_logprobs
LOGITS, LOGP, SQUARE = torch.zeros(N, V), torch.full((N,), -1.0), torch.full((N,), 0.5)
GAP = rf.gradient_gap(HIDDEN, WEIGHT, ROLLOUTS)
REFUSED = {
    "stats: hidden shape": (lambda: stats(HIDDEN.view(R, T, D)), ValueError, r"hidden must have 2 .*\[3, 2, 3\]"),
    "logprob: hidden one-dimensional": (lambda: logprob(HIDDEN[0]), ValueError, r"hidden must have .*\[3\]"),
    "logprob: hidden without width": (lambda: logprob(torch.zeros(R, T, 0), torch.zeros(V, 0), TOKENS.view(R, T)),
                                      ValueError, "weight must be .* V, D >= 1"),
    "logprob: tokens of a batch": (lambda: logprob(HIDDEN.view(R, T, D), WEIGHT, TOKENS), ValueError,
                                   r"tokens must have shape \[3, 2\], got .*\[6\]"),
    "gap: hidden rows": (lambda: gap(HIDDEN[:-1]), ValueError, r"hidden must start with \[3, 2\] .*\[6\]"),
    "gap: hidden device": (lambda: gap(HIDDEN.to("meta")), ValueError, "hidden must be on cpu"),
    "gap: hidden without width": (lambda: gap(torch.ones(N)), ValueError, "hidden must have 2 dimension"),
    "gap: rollouts": (lambda: gap(rollouts=TOKENS), TypeError, "rollouts must be .* got Tensor"),
    "gap: vocabulary": (lambda: gap(weight=WEIGHT[:-1]), ValueError, "rollouts must hold tokens below V = 4 .*got 4"),
    "gap: level unknown": (lambda: gap(level="model"), ValueError, "level must be one of .*, head; got 'model'"),
    "gap: level None": (lambda: gap(level=None), TypeError, "level must be a string"),
    "gap: length_norm text": (lambda: gap(length_norm="no"), TypeError, "length_norm must be a bool"),
    "gap: weights list": (lambda: GAP.batch_norm_sq([1.0]), TypeError, "weights must be a torch.Tensor"),
    "gap: weights shape": (lambda: GAP.batch_norm_sq(torch.ones(2)), ValueError, r"weights must have shape \[1\]"),
    "gap: weights NaN": (lambda: GAP.batch_norm_sq(torch.tensor([NAN])), ValueError, "weights must be"),
    "gap: direction list": (lambda: GAP.alignment([1.0]), TypeError, "direction must be a torch.Tensor"),
    "gap: direction shape": (lambda: GAP.alignment(torch.ones(V)), ValueError, r"direction must have shape \[3\]"),
    "gap: direction device": (lambda: GAP.alignment(torch.ones(D, device="meta")), ValueError, "direction must be"),
    "gap: direction complex": (lambda: GAP.alignment(torch.ones(D) * 1j), TypeError, "direction must have dtype"),
    "gap: sizes": (lambda: gap_from_gradients(GAP.gradients, level="hidden", length_norm=True, sizes=[1, 1]),
                   ValueError, "sizes must count"),
    "logits: not a tensor": (lambda: from_logits([[0.0]], TOKENS), TypeError, "logits must be a torch"),
    "logits: shape": (lambda: from_logits(LOGITS[0], TOKENS), ValueError, "logits must have 2 dim"),
    "logits: no vocabulary": (lambda: from_logits(LOGITS[:, :0], TOKENS), ValueError, "logits .*V >= 1"),
    "logits: float64": (lambda: from_logits(LOGITS.double(), TOKENS), TypeError, "logits must have dtype"),
    "logits: tokens": (lambda: from_logits(LOGITS, TOKENS[1:]), ValueError, "tokens must have shape"),
    "logits: tokens beyond": (lambda: from_logits(LOGITS, TOKENS + 1), ValueError, "tokens must be in"),
    "logits: NaN": (lambda: from_logits(changed(LOGITS, NAN), TOKENS), ValueError, "^logits"),
    "logits: infinite": (lambda: from_logits(changed(LOGITS, INF), TOKENS), ValueError, "^logits"),
    "logits: sampled token out": (lambda: from_logits(changed(LOGITS, -INF), TOKENS), ValueError,
                                  "^logits"),
    "logits: temperature": (lambda: from_logits(LOGITS, TOKENS, temperature=0), ValueError, "temperature"),
    "logprobs: not a tensor": (lambda: from_logprobs(-1.0, SQUARE), TypeError, "logp must be a torch"),
    "logprobs: shape": (lambda: from_logprobs(LOGITS, SQUARE), ValueError, "logp must have 1 dim"),
    "logprobs: dtype": (lambda: from_logprobs(LOGP.long(), SQUARE), TypeError, "logp must have dtype"),
    "logprobs: positive": (lambda: from_logprobs(changed(LOGP, 0.1, 3), SQUARE), ValueError,
                           "logp must be at most 0, got 0.1.* at position 3"),
    "logprobs: NaN": (lambda: from_logprobs(changed(LOGP, NAN), SQUARE), ValueError, "logp must be at"),
    "square: shape": (lambda: from_logprobs(LOGP, SQUARE[1:]), ValueError, "sum_p_sq must have shape"),
    "square: device": (lambda: from_logprobs(LOGP, SQUARE.to("meta")), ValueError, "sum_p_sq must be on"),
    "square: zero": (lambda: from_logprobs(LOGP, SQUARE * 0), ValueError, r"sum_p_sq must be in \(0, 1\]"),
    "square: above one": (lambda: from_logprobs(LOGP, SQUARE * 3), ValueError, "sum_p_sq must be in .*1.5"),
    "square: NaN": (lambda: from_logprobs(LOGP, changed(SQUARE, NAN)), ValueError, "sum_p_sq must be in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_of_one_function(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_scalar_tensors_and_integers_are_numbers():
    exact = stats(temperature=2.0, softcap=3.0)
    for two, three in ((2, 3), (torch.tensor(2.0), torch.tensor([3]))):
        assert torch.equal(stats(temperature=two, softcap=three).logp, exact.logp)
