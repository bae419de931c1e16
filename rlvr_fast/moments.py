"""What estimates need to know of the responses' gradients: three inner products per response.

With G_i the gradient of response i's log-probability and S± the sums over its prompt's correct / incorrect responses:
‖G_i‖², ⟨G_i, S₊⟩ and ⟨G_i, S₋⟩. Every gap norm, its bias correction and its jackknife follow from these, whatever
parameters the gradients belong to and however the products were formed.

There are two ways to add, one on each side of the square:

* ``ResponseGradients`` hold the G_i themselves. They are linear in the tokens: adding them joins parts of the *same
  responses* (context-parallel shards, chunks), ``merge`` joins *different responses* (micro-batches, ranks), with the
  responses of one prompt split in any way.
* ``Moments`` are inner products. They are linear in the *coordinates* of the gradient: adding them joins layers,
  vocabulary shards or tensor-parallel shards of the same responses; ``merge`` joins batches of different prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from rlvr_fast.segments import Segments

GRAM_COLUMNS = 8192  # coordinates taken to float64 at a time


@dataclass(frozen=True, eq=False, repr=False)
class Responses:
    """Which response belongs to which prompt and class.

    Attributes:
        correct: [R] bool.
        prompt_index: [R] int64 in [0, P).
        prompt_ids: the P prompt ids.
    """

    correct: torch.Tensor
    prompt_index: torch.Tensor
    prompt_ids: tuple[Hashable, ...]

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_ids)

    @property
    def cell(self) -> torch.Tensor:
        """[R] int64: the (prompt, class) cell of each response, ``2 * prompt + correct``."""
        return 2 * self.prompt_index + self.correct.long()

    def check_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The host's counts of each prompt's responses, as a tuple, if they add up."""
        if len(sizes) != self.n_prompts or sum(sizes) != self.correct.numel():
            raise ValueError(f"sizes must count the {self.correct.numel()} responses of each of {self.n_prompts} "
                             f"prompts, got {len(sizes)} numbers that add up to {sum(sizes)}")
        return tuple(sizes)

    def by_prompt(self, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Per prompt the indices of its responses, in rollout order; ``sizes`` are the host's counts of them."""
        return iter(torch.argsort(self.prompt_index, stable=True).split(self.check_sizes(sizes)))

    def class_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Σ over the responses of each prompt and class: [R, ...] -> [P, 2, ...]; class 0 incorrect, 1 correct."""
        return self._cells.sum(values).unflatten(0, (self.n_prompts, 2))

    @cached_property
    def _cells(self) -> Segments:
        return Segments.of(self.cell, 2 * self.n_prompts)

    def same_as(self, other: Responses) -> bool:
        return self is other or (self.prompt_ids == other.prompt_ids
                                 and torch.equal(self.prompt_index, other.prompt_index)
                                 and torch.equal(self.correct, other.correct))

    @classmethod
    def merge(cls, parts: Sequence[Responses]) -> Responses:
        """The responses of all parts in a row; prompts with one id become one prompt."""
        numbers: dict[Hashable, int] = {}
        index = []
        for part in parts:
            renumbered = [numbers.setdefault(identity, len(numbers)) for identity in part.prompt_ids]
            lookup = torch.tensor(renumbered, device=part.prompt_index.device, dtype=torch.int64)
            index.append(lookup[part.prompt_index])
        return cls(torch.cat([part.correct for part in parts]), torch.cat(index), tuple(numbers))


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Inner products of the responses' gradients with themselves and with their prompt's class sums.

    Attributes:
        responses: the prompt and class of each response.
        sq: [R] float64, ‖G_i‖².
        dot_class: [R, 2] float64, ⟨G_i, S₋⟩ and ⟨G_i, S₊⟩.
    """

    responses: Responses
    sq: torch.Tensor
    dot_class: torch.Tensor

    @classmethod
    def from_gram(cls, responses: Responses, grams: Sequence[torch.Tensor]) -> Moments:
        """From one Gram matrix [n, n] per prompt, rows and columns in rollout order."""
        n_responses = responses.correct.numel()
        sq = torch.zeros(n_responses, dtype=torch.float64, device=responses.correct.device)
        dot_class = torch.zeros(n_responses, 2, dtype=torch.float64, device=responses.correct.device)
        for index, gram in zip(responses.by_prompt([len(gram) for gram in grams]), grams, strict=True):
            is_correct = responses.correct[index].double()
            sq[index] = gram.diagonal()
            dot_class[index] = gram @ torch.stack([1.0 - is_correct, is_correct], 1)
        return cls(responses, sq, dot_class)

    def __add__(self, other: Moments) -> Moments:
        """Join two groups of coordinates (layers, shards) of the same responses."""
        if not isinstance(other, Moments):
            return NotImplemented
        if not self.responses.same_as(other.responses):
            raise ValueError("moments can be added only for the same responses; use Moments.merge for other prompts, "
                             "ResponseGradients.merge for other responses of the same prompts")
        return replace(self, sq=self.sq + other.sq, dot_class=self.dot_class + other.dot_class)

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Join batches of different prompts. Inner products across batches are not known, so no prompt may recur."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts must hold at least one Moments, got none")
        ids = [identity for part in parts for identity in part.responses.prompt_ids]
        if len(set(ids)) != len(ids):
            raise ValueError("a prompt occurs in two of the parts: merge their ResponseGradients instead, inner "
                             "products between the parts are not in their Moments")
        return cls(Responses.merge([part.responses for part in parts]), torch.cat([part.sq for part in parts]),
                   torch.cat([part.dot_class for part in parts]))

    @property
    def count(self) -> torch.Tensor:
        """[P, 2] float64: n₋, n₊."""
        return self.responses.class_sum(torch.ones_like(self.sq))

    @property
    def square(self) -> torch.Tensor:
        """[P, 2] float64: Q₋, Q₊ = Σ ‖G_i‖²."""
        return self.responses.class_sum(self.sq)

    @property
    def product(self) -> torch.Tensor:
        """[P, 2, 2] float64: ⟨S_a, S_b⟩ for classes a, b."""
        return self.responses.class_sum(self.dot_class)

    def __repr__(self) -> str:
        return f"Moments(prompts={self.responses.n_prompts}, responses={self.sq.numel()}, device={self.sq.device})"


@dataclass(frozen=True, eq=False, repr=False)
class ResponseGradients:
    """The gradient vector of every response's log-probability.

    Attributes:
        responses: the prompt and class of each response.
        vectors: [R, K] float32, G_i.
    """

    responses: Responses
    vectors: torch.Tensor

    def __add__(self, other: ResponseGradients) -> ResponseGradients:
        """Join parts of the same responses' tokens."""
        if not isinstance(other, ResponseGradients):
            return NotImplemented
        if not self.responses.same_as(other.responses) or self.vectors.shape != other.vectors.shape:
            raise ValueError("response gradients can be added only for the same responses and coordinates; "
                             "use ResponseGradients.merge for other responses")
        return replace(self, vectors=self.vectors + other.vectors)

    @classmethod
    def merge(cls, parts: Sequence[ResponseGradients]) -> ResponseGradients:
        """Join different responses, of the same or of other prompts (micro-batches, ranks)."""
        parts = list(parts)
        widths = sorted({part.vectors.shape[1] for part in parts})
        if len(widths) != 1:
            raise ValueError(f"parts must hold at least one ResponseGradients, all of one width; got widths {widths}")
        return cls(Responses.merge([part.responses for part in parts]), torch.cat([part.vectors for part in parts]))

    def class_means(self) -> torch.Tensor:
        """[P, 2, K] float32: mean gradient of the incorrect and of the correct responses; NaN for an empty class."""
        count = self.responses.class_sum(torch.ones_like(self.vectors[:, 0]))
        return self.responses.class_sum(self.vectors) / torch.where(count > 0, count, torch.nan)[..., None]

    def moments(self) -> Moments:
        """Their inner products, accumulated in float64."""
        n_responses, width = self.vectors.shape
        sq = torch.zeros(n_responses, dtype=torch.float64, device=self.vectors.device)
        dot_class = torch.zeros(n_responses, 2, dtype=torch.float64, device=self.vectors.device)
        for start in range(0, width, GRAM_COLUMNS):
            part = self.vectors[:, start:start + GRAM_COLUMNS].double()
            sums = self.responses.class_sum(part)
            sq += part.square().sum(1)
            for which in range(2):
                dot_class[:, which] += (part * sums[self.responses.prompt_index, which]).sum(1)
        return Moments(self.responses, sq, dot_class)

    def grams(self, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Per prompt ⟨G_i, G_j⟩ over its responses: [n, n] float64 each; ``sizes`` are the host's counts of them."""
        grams = []
        for index in self.responses.by_prompt(sizes):
            own = self.vectors[index]
            gram = torch.zeros(len(index), len(index), dtype=torch.float64, device=own.device)
            for start in range(0, own.shape[1], GRAM_COLUMNS):
                part = own[:, start:start + GRAM_COLUMNS].double()
                gram += part @ part.T
            grams.append(gram)
        return tuple(grams)

    def __repr__(self) -> str:
        return (f"ResponseGradients(prompts={self.responses.n_prompts}, responses={self.vectors.shape[0]}, "
                f"coordinates={self.vectors.shape[1]}, device={self.vectors.device})")
