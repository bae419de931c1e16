"""Small problems with known answers: policies that can be enumerated, random heads and random ragged batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import rlvr_fast.reference as ref
from rlvr_fast import Rollouts

END = 0


@dataclass(frozen=True)
class TabularPolicy:
    """A softmax policy with a free hidden state per prefix; a response ends at ``END`` or after ``length`` tokens.

    Attributes:
        hidden: [n_prefixes, D] float64, one row per prefix without ``END`` of fewer than ``length`` tokens.
        weight: [V, D] float64. bias: [V] float64.
    """

    length: int
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(cls, vocabulary: int, length: int, width: int, generator: torch.Generator) -> TabularPolicy:
        n_prefixes = sum((vocabulary - 1) ** t for t in range(length))
        sizes = ((n_prefixes, width), (vocabulary, width), (vocabulary,))
        return cls(length, *(torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes))

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """Every response that can be sampled."""
        words = range(1, len(self.weight))
        ended = [(*prefix, END) for t in range(self.length) for prefix in itertools.product(words, repeat=t)]
        return ended + list(itertools.product(words, repeat=self.length))

    def prefix_rows(self) -> torch.Tensor:
        """[N]: the row of ``hidden`` behind each token of ``responses`` in a row."""
        numbers: dict[tuple[int, ...], int] = {}
        rows = [numbers.setdefault(r[:t], len(numbers)) for r in self.responses for t in range(len(r))]
        return torch.tensor(rows)

    def rollouts(self, correct: torch.Tensor) -> Rollouts:
        """Every response once, as responses to one prompt."""
        tokens = torch.tensor([token for response in self.responses for token in response])
        ends = torch.tensor([0, *itertools.accumulate(map(len, self.responses))])
        return Rollouts.from_packed(tokens, ends, correct.float(), group_size=len(self.responses))

    def log_probability(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[S] float64: log π of every response, by autograd-friendly torch and nothing of the package."""
        tokens = [token for response in self.responses for token in response]
        logp = torch.log_softmax(hidden[self.prefix_rows()] @ weight.T + bias, 1)[range(len(tokens)), tokens]
        return torch.stack([part.sum() for part in logp.split([len(r) for r in self.responses])])

    def probability(self) -> torch.Tensor:
        return self.log_probability(self.hidden, self.weight, self.bias).exp()


def random_rollouts(n_responses: int, n_prompts: int, vocabulary: int, generator: torch.Generator, *,
                    longest: int = 7, correct: torch.Tensor | None = None) -> Rollouts:
    """A packed ragged batch: unequal, interleaved groups, some empty responses, random verdicts unless given."""
    lengths = torch.randint(0, longest + 1, (n_responses,), generator=generator)
    tokens = torch.randint(0, vocabulary, (int(lengths.sum()),), generator=generator)
    if correct is None:
        correct = torch.rand(n_responses, generator=generator) < 0.5
    prompts = torch.randint(0, n_prompts, (n_responses,), generator=generator)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Rollouts.from_packed(tokens, ends, correct.float(), [f"prompt {p}" for p in prompts.tolist()])


@dataclass(frozen=True)
class HeadProblem:
    """One input of the head pass. A problem is data; every implementation answers it."""

    vocabulary: int
    width: int
    n_tokens: int
    dtype: torch.dtype = torch.float32
    bias: str | None = None  # None, "random", or "masked": a third of the tokens, never a sampled one, at -inf
    temperature: float = 1.0
    softcap: float | None = None
    spread: float = 3.0  # standard deviation of the logits
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"V{self.vocabulary}", f"D{self.width}", f"N{self.n_tokens}", str(self.dtype).removeprefix("torch.")]
        parts += [f"bias={self.bias}"] if self.bias else []
        parts += [f"T={self.temperature:g}"] if self.temperature != 1 else []
        parts += [f"cap={self.softcap:g}"] if self.softcap else []
        return "-".join(parts)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden [N, D], weight [V, D], tokens [N], bias [V] or None."""
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.n_tokens, self.width, generator=generator)
        weight = torch.randn(self.vocabulary, self.width, generator=generator) * self.spread / math.sqrt(self.width)
        tokens = torch.randint(0, self.vocabulary, (self.n_tokens,), generator=generator)
        bias = None
        if self.bias:
            bias = torch.randn(self.vocabulary, generator=generator)
            if self.bias == "masked":
                masked = torch.rand(self.vocabulary, generator=generator) < 1 / 3
                masked[tokens] = False
                bias[masked] = -torch.inf
        return hidden.to(self.dtype), weight.to(self.dtype), tokens, bias

    @property
    def options(self) -> dict:
        return {"temperature": self.temperature, "softcap": self.softcap}


def reference_pass(hidden, weight, tokens, bias=None, temperature=1.0, softcap=None) -> dict[str, torch.Tensor]:
    """Every field of TokenPass by the float64 specification."""
    z = ref.logits(hidden, weight, bias, temperature, softcap)
    slope = ref.logit_slope(hidden, weight, bias, temperature, softcap)
    return {"logp": ref.log_prob(z, tokens), "lse": z.logsumexp(1), "entropy": ref.entropy(z),
            "sum_p_sq": ref.sum_p_sq(z), "score_sq": ref.score_sq(z, tokens, slope),
            "off_mass": ref.off_target_mass(z, tokens)}


def reference_gradients(hidden, weight, rollouts: Rollouts, level: str, length_norm: bool, bias=None, temperature=1.0,
                        softcap=None) -> torch.Tensor:
    """[R, K] float64: every response's gradient by the specification; ``hidden`` in rollout order."""
    options = (bias, temperature, softcap)
    z, slope = ref.logits(hidden, weight, *options), ref.logit_slope(hidden, weight, *options)
    scores = ref.score(z, rollouts.tokens, slope)
    coefficients = ref.token_coefficients(rollouts.lengths.tolist(), length_norm)
    if level == "logits":
        return ref.response_gradients_logits(scores, coefficients, rollouts.bounds)
    if level == "hidden":
        return ref.response_gradients_hidden(scores, weight, coefficients, rollouts.bounds)
    return ref.response_gradients_head(scores, hidden, coefficients, rollouts.bounds)


def classes_of(rollouts: Rollouts, prompt: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One prompt's rows of [R, ...], split into (correct, incorrect)."""
    members = torch.tensor(rollouts.members[prompt], dtype=torch.int64)
    right = rollouts.correct[members]
    return rows[members[right]], rows[members[~right]]


def within(actual: torch.Tensor, expected: torch.Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Whether every |actual - expected| ≤ atol + rtol |expected|; NaN is never within."""
    actual, expected = actual.double(), expected.double()
    return bool(((actual - expected).abs() <= atol + rtol * expected.abs()).all())


def worst(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """For assertion messages: the largest absolute and relative error."""
    error = (actual.double() - expected.double()).abs()
    relative = error / expected.double().abs()
    return f"largest absolute error {error.max():.3g}, relative {relative.max():.3g}" if error.numel() else "empty"


def partitions(items: Sequence, generator: torch.Generator, parts: int) -> list[list]:
    """``items`` dealt at random to ``parts`` non-empty piles, order kept within each."""
    owner = torch.cat([torch.arange(parts), torch.randint(0, parts, (len(items) - parts,), generator=generator)])
    owner = owner[torch.randperm(len(items), generator=generator)].tolist()
    return [[item for item, own in zip(items, owner, strict=True) if own == pile] for pile in range(parts)]
