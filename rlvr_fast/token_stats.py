"""Per-token log-prob, entropy and score norm out of hidden states and an lm_head: the head pass as a function.

``token_stats`` measures; ``linear_logprob`` is the same pass as a differentiable operator for a training loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.backends import TokenPass
from rlvr_fast.head import Head, check_tokens, check_values
from rlvr_fast.vocabulary_parallel import VocabularyShard, agreement

ROUNDING = 1e-5  # how far a framework's float32 sums may push a log-prob above 0 or Σp² above 1


@dataclass(frozen=True, eq=False, repr=False)
class TokenStats:
    """Statistics of the sampled tokens' distributions, each [N] float32; None where the caller's inputs cannot tell.

    Attributes:
        logp: log p_y, at most 0.
        lse: log Σ_v exp z_v of the logits that enter the softmax.
        entropy: -Σ p log p, in nats.
        sum_p_sq: Σ_v p_v², the collision probability.
        score_sq: ‖∂logp/∂raw‖² for the raw head output, (Σ_{v≠y} p_v)² + Σ_{v≠y} p_v² at temperature 1.
        hidden_grad: [N, D] ∂logp/∂hidden, where asked for.
    """

    logp: torch.Tensor
    lse: torch.Tensor | None
    entropy: torch.Tensor | None
    sum_p_sq: torch.Tensor
    score_sq: torch.Tensor
    hidden_grad: torch.Tensor | None = None

    @classmethod
    def from_pass(cls, token_pass: TokenPass, hidden_grad: torch.Tensor | None = None) -> TokenStats:
        """The public view of what a backend returned."""
        return cls(token_pass.logp, token_pass.lse, token_pass.entropy, token_pass.sum_p_sq, token_pass.score_sq,
                   hidden_grad)

    def __repr__(self) -> str:
        def mean(values: torch.Tensor | None) -> str:
            return "n/a" if values is None or values.numel() == 0 else f"{values.mean().item():.4g}"

        return (f"TokenStats(tokens={self.logp.numel()}; means: logp={mean(self.logp)}, "
                f"entropy={mean(self.entropy)}, sum_p_sq={mean(self.sum_p_sq)}, score_sq={mean(self.score_sq)}; "
                f"device={self.logp.device})")


def token_stats(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, *, bias: torch.Tensor | None = None,
                temperature: float = 1.0, softcap: float | None = None, hidden_grad: bool = False,
                vocabulary: VocabularyShard | None = None, backend: str = "auto") -> TokenStats:
    """Statistics of sampled tokens in one pass over the vocabulary, without an [N, V] buffer.

    Args:
        hidden: [N, D] final hidden states at the positions that predict ``tokens``; float32, bfloat16 or float16.
        weight: [V, D] lm_head weight, same dtype.
        tokens: [N] integer ids of the sampled tokens, in [0, V).
        bias: [V] or None.
        temperature: divides the logits.
        softcap: z = softcap·tanh(raw/softcap) before the temperature, or None.
        hidden_grad: also return ∂logp/∂hidden, at the price of a second N·V·D product.
        vocabulary: this rank's shard of the vocabulary, where ``weight`` and ``bias`` are its rows only. The call is
            collective then: one all-gather of 24·N bytes per rank, and an all-reduce of ∂logp/∂hidden where asked for.
        backend: "auto", "torch", "native" or "triton".

    Returns:
        TokenStats; accumulated in float32 or better whatever the dtype of the inputs.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    with agreement(vocabulary) as same:
        head = Head.checked(hidden, weight, bias, temperature, softcap, vocabulary)
        tokens = check_tokens(tokens, hidden.shape[0], head.whole_vocabulary_size, hidden.device)
        check_values(hidden)
        backends.resolve(backend, hidden.device)
        same("token_stats", hidden, tokens, head, f"hidden_grad {hidden_grad}")
    if not hidden_grad:
        return TokenStats.from_pass(run_head_pass(hidden, tokens, head, backend))
    with torch.no_grad():  # a graph would keep every tile of scores alive
        run = backends.select("head_pass_with_gradient", backend, hidden.device)
        token_pass, gradient = run(hidden, head.local_ids(tokens), head, merge=head.merge)
        return TokenStats.from_pass(check_pass(token_pass, tokens), head.total(gradient))


def run_head_pass(hidden: torch.Tensor, tokens: torch.Tensor, head: Head, backend: str) -> TokenPass:
    """The head pass of validated inputs over the whole vocabulary, its results checked for NaN on the CPU."""
    with torch.no_grad():
        run = backends.select("head_pass", backend, hidden.device)
        token_pass = run(hidden, head.local_ids(tokens), head)
        return check_pass(token_pass if head.merge is None else head.merge(token_pass)[0], tokens)


def check_pass(token_pass: TokenPass, tokens: torch.Tensor, source: str = "weight and bias must give finite logits"
               ) -> TokenPass:
    """Raise if a CPU pass is not finite: the head holds NaN or infinity, or a sampled token has probability zero."""
    if token_pass.logp.device.type == "cpu":
        bad = ~torch.stack(token_pass).isfinite().all(0)
        if bad.any():
            where = int(bad.nonzero()[0])
            raise ValueError(f"{source} and every sampled token a probability above 0, "
                             f"got logp {token_pass.logp[where].item()} with lse {token_pass.lse[where].item()} "
                             f"for token {int(tokens[where])} at position {where}")
    return token_pass


def token_stats_from_logits(logits: torch.Tensor, tokens: torch.Tensor, *, temperature: float = 1.0,
                            backend: str = "auto") -> TokenStats:
    """The same statistics for a caller that holds the logits: one read of them.

    Args:
        logits: [N, V] raw head output, float. Entries of minus infinity are outside the vocabulary.
        tokens: [N] integer ids in [0, V).
        temperature: divides the logits.
        backend: "auto", "torch", "triton" or "cuda" (see ``backends.row_pass``).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check.tensor("logits", logits, ndim=2, dtypes=check.FLOAT_DTYPES)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V] with V >= 1, got {check.describe(logits)}")
    tokens = check_tokens(tokens, logits.shape[0], logits.shape[1], logits.device)
    temperature = check.positive("temperature", temperature)
    from rlvr_fast.backends.row_pass import logits_pass

    token_pass = logits_pass(logits.detach(), tokens, temperature, backend=backend)
    return TokenStats.from_pass(check_pass(token_pass, tokens, "logits must be finite (or -inf)"))


def token_stats_from_logprobs(logp: torch.Tensor, sum_p_sq: torch.Tensor) -> TokenStats:
    """What follows from a framework's own (log p_y, Σ p²): the score norm 1 − 2 p_y + Σ p², at temperature 1.

    Written as (1 − p_y)² + (Σp² − p_y²) with 1 − p_y = −expm1(logp). The second term is a difference of the caller's
    numbers: for p_y → 1 it has no more digits than they leave.

    Args:
        logp: [N] float log-probs, at most 0 (what rounding puts above it, up to 1e-5, counts as 0).
        sum_p_sq: [N] float, in (0, 1], likewise.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    dtypes = (*check.FLOAT_DTYPES, torch.float64)
    check.tensor("logp", logp, ndim=1, dtypes=dtypes)
    check.tensor("sum_p_sq", sum_p_sq, shape=tuple(logp.shape), dtypes=dtypes, device=logp.device)
    if logp.device.type == "cpu":
        inside = (sum_p_sq > 0) & (sum_p_sq <= 1 + ROUNDING)
        for name, values, good in (("logp", logp, logp <= ROUNDING), ("sum_p_sq", sum_p_sq, inside)):
            if not good.all():
                where = int((~good).nonzero()[0])
                wanted = "at most 0" if name == "logp" else "in (0, 1]"
                raise ValueError(f"{name} must be {wanted}, got {values[where].item()} at position {where}")
    logp64, square = logp.detach().double().clamp(max=0.0), sum_p_sq.detach().double().clamp(max=1.0)
    score_sq = torch.expm1(logp64).square() + (square - torch.exp(2 * logp64)).clamp(min=0.0)
    return TokenStats(logp64.float(), None, None, square.float(), score_sq.float())
