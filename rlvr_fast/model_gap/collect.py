"""From what layers see in the backward to inner products per prompt (Gram matrices) or to sketches per response.

Layers report three shapes of per-response gradient: ``outer`` Σ b_t a_tᵀ (linear weights), ``rows`` Σ b_t in row x_t
(embeddings), ``vector`` (biases, scales). A parameter used several times has the sum of its uses as gradient, so their
inner products are taken only when all uses have reported; a tied embedding is the case outer + rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch

from rlvr_fast.model_gap.ghost import ghost_gram
from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.model_gap.segmented import accumulation_dtype, device_products, segmented_gram
from rlvr_fast.model_gap.sketch import Fold, span_products
from rlvr_fast.model_gap.tensor_parallel.layers import Part
from rlvr_fast.rollouts import Rollouts


def weight_gradient(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Σ_t b_t a_tᵀ over all rows, as a plain linear layer's backward forms it."""
    return b.T @ a


def span_sums(values: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Sum of the rows of ``values`` [M, d] in each span: [n, d] in the accumulation dtype."""
    dtype = accumulation_dtype(values.dtype)
    return torch.stack([values[start:stop].sum(0, dtype=dtype) for start, stop in spans])


def ghost_is_cheaper(n_tokens: int, n_responses: int, d_out: int, d_in: int) -> bool:
    """Whether the tokens' Gram costs less than segmenting a weight gradient that is formed anyway.

    Ghost: M² (d_out + d_in) multiply-adds. Segmented: n² d_out d_in of them, and n matrices of d_out d_in written and
    read where one would do; a float moved counts as 16 multiply-adds. Far below the break-even against separate
    materialisation, M* = 2 d_out d_in / (d_out + d_in) [derived].
    """
    return n_tokens**2 * (d_out + d_in) < n_responses * (n_responses + 16) * d_out * d_in


@dataclass
class _Held:
    """Uses of one parameter in one forward that have reported so far."""

    outer: list[tuple[torch.Tensor, torch.Tensor, Spans]] = field(default_factory=list)
    rows: list[tuple[torch.Tensor, torch.Tensor, Spans]] = field(default_factory=list)
    vectors: list[torch.Tensor] = field(default_factory=list)
    vocabulary: list[torch.Tensor] = field(default_factory=list)  # per prompt: H_i restricted to the rows looked up


def vector_products(rollouts: Rollouts, vectors: torch.Tensor, direction: torch.Tensor | None
                    ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the gradients [R, d] of one parameter: ⟨G_i, G_j⟩ [R, n_max], and [R] ⟨direction, G_i⟩, both float64."""
    vectors = vectors.double()
    table = vectors.new_zeros(len(vectors), max(map(len, rollouts.members)))
    for members in rollouts.members:
        own = vectors[list(members)]
        table[list(members), :len(members)] = own @ own.T
    return table, None if direction is None else vectors @ direction.double()


class GramCollector:
    """Exact inner products, per parameter and prompt; needs all responses of a prompt in one forward.

    Args:
        parts: what is here of parameters that are spread over ranks (``tensor_parallel.Part``), filled as layers run.

    Attributes:
        grams: per parameter [R, n_max] float64, ⟨G_i, G_j⟩ with the j-th response of the same prompt.
        dots: per parameter [R] float64, ⟨direction, G_i⟩; empty without a direction.
        vectors: per parameter [R, d], gradients that are partial sums yet.
    """

    def __init__(self, rollouts: Rollouts, shapes: Mapping[str, tuple[int, ...]], *, ghost: bool,
                 direction: dict[str, torch.Tensor], parts: dict[str, Part] | None = None) -> None:
        self.ghost, self.shapes, self.direction, self.parts = ghost, shapes, direction, {} if parts is None else parts
        self.vectors: dict[str, torch.Tensor] = {}
        self.n_responses = rollouts.n_responses
        self.width = max((len(members) for members in rollouts.members), default=0)
        self.grams: dict[str, torch.Tensor] = {}
        self.dots: dict[str, torch.Tensor] = {}
        self._held: dict[tuple[MicroBatch, str], _Held] = defaultdict(_Held)

    def outer(self, name: str, micro_batch: MicroBatch, b: torch.Tensor, a: torch.Tensor, spans: Spans,
              want_gradient: bool) -> torch.Tensor | None:
        """Take the factors b [M, d_out], a [M, d_in]; returns Σ b_t a_tᵀ when wanted."""
        held = self._held[micro_batch, name]
        held.outer.append((b, a, spans))
        if not _complete(micro_batch, name, "outer"):
            return weight_gradient(b, a) if want_gradient else None
        return self._reduce_outer(name, micro_batch, held, want_gradient)

    def rows(self, name: str, micro_batch: MicroBatch, ids: torch.Tensor, b: torch.Tensor, spans: Spans) -> None:
        """Take an embedding's ids [M] and b [M, D]."""
        held = self._held[micro_batch, name]
        held.rows.append((ids, b, spans))
        if _complete(micro_batch, name, "rows") and _complete(micro_batch, name, "outer"):
            self._reduce_rows(name, micro_batch, held)

    def vector(self, name: str, micro_batch: MicroBatch, values: torch.Tensor, spans: Spans) -> None:
        """Take what each row adds to the gradient, [M, d]."""
        held = self._held[micro_batch, name]
        held.vectors.append(span_sums(values, spans))
        if _complete(micro_batch, name, "vector"):
            self._reduce_vector(name, micro_batch, held)

    def partial(self, name: str, micro_batch: MicroBatch, values: torch.Tensor, spans: Spans) -> None:
        """As ``vector``, where other ranks have other rows of the same responses."""
        sums = span_sums(values, spans)
        own = self.vectors.setdefault(name, sums.new_zeros(self.n_responses, sums.shape[1]))
        own.index_add_(0, micro_batch.index(sums.device)[0], sums)

    def flush(self, micro_batch: MicroBatch) -> None:
        """Reduce what still waits for uses that took no part in the backward."""
        for key in [key for key in self._held if key[0] is micro_batch]:
            held, name = self._held[key], key[1]
            if held.vectors:
                self._reduce_vector(name, micro_batch, held)
                continue
            if held.outer:
                self._reduce_outer(name, micro_batch, held, False)
            if held.rows:
                self._reduce_rows(name, micro_batch, held)
            self._held.pop(key, None)

    def _reduce_outer(self, name: str, micro_batch: MicroBatch, held: _Held, want_gradient: bool
                      ) -> torch.Tensor | None:
        pieces = [[(b[s:e], a[s:e]) for b, a, spans in held.outer for s, e in (spans[i],)]
                  for i in range(len(micro_batch.responses))]
        groups = [[pieces[i] for i in places] for _, places in micro_batch.groups]
        b, a, _ = held.outer[-1]
        shape, direction = (b.shape[1], a.shape[1]), self._along(name)
        longest = max(sum(len(piece[0]) for own in group for piece in own) for group in groups)
        most = max(len(group) for group in groups)
        on_device = None if self.ghost else device_products(b, a, most)  # the ghost rule counts torch's products
        total = None
        if on_device is None and (self.ghost or ghost_is_cheaper(longest, most, *shape)):
            grams, dots = ghost_gram(groups, direction)
        else:
            if want_gradient and len(held.outer) == 1:  # comes out of the same sweep
                total = torch.zeros(shape, dtype=accumulation_dtype(b.dtype), device=b.device)
            if on_device is None:
                grams, dots = segmented_gram(groups, shape, direction, total)
            else:
                grams, dots = on_device(held.outer, [places for _, places in micro_batch.groups], direction=direction,
                                        gradient=total)
        gradient = weight_gradient(b, a) if want_gradient and total is None else total
        self._add(name, micro_batch, grams, dots)
        if name in micro_batch.embedding_ids:  # tied: keep the head's gradient on the rows that the embedding owns
            for responses, ids in zip(groups, self._looked_up(name, micro_batch), strict=True):
                head = [_added(b[:, ids].T.to(accumulation_dtype(b.dtype)) @ a.to(accumulation_dtype(a.dtype))
                               for b, a in own) for own in responses]
                held.vocabulary.append(torch.stack(head))
        held.outer = []
        if name not in micro_batch.embedding_ids:
            self._held.pop((micro_batch, name))
        return gradient

    def _reduce_rows(self, name: str, micro_batch: MicroBatch, held: _Held) -> None:
        grams, dots, direction = list[torch.Tensor](), list[torch.Tensor](), self._along(name)
        for (_, places), ids in zip(micro_batch.groups, self._looked_up(name, micro_batch), strict=True):
            width = held.rows[0][1].shape[1]
            dtype = accumulation_dtype(held.rows[0][1].dtype)
            own = torch.zeros(len(places), len(ids), width, dtype=dtype, device=ids.device)
            for looked_up, b, spans in held.rows:
                for response, place in enumerate(places):
                    s, e = spans[place]
                    own[response].index_add_(0, torch.searchsorted(ids, looked_up[s:e]), b[s:e].to(dtype))
            flat = own.flatten(1)
            gram = (flat @ flat.T).double()
            if held.vocabulary:
                cross = (held.vocabulary[len(grams)].flatten(1).to(dtype) @ flat.T).double()
                gram += cross + cross.T
            grams.append(gram)
            if direction is not None:
                dots.append((flat @ direction[ids].reshape(-1).to(dtype)).double())
        self._add(name, micro_batch, grams, dots)
        self._held.pop((micro_batch, name))

    def _reduce_vector(self, name: str, micro_batch: MicroBatch, held: _Held) -> None:
        values = _added(held.vectors)
        grams, dots, direction = [], [], self._along(name)
        for places in micro_batch.index(values.device)[2]:
            own = values[places].double()
            grams.append(own @ own.T)
            if direction is not None:
                dots.append(own @ direction.double())
        self._add(name, micro_batch, grams, dots)
        self._held.pop((micro_batch, name))

    def _along(self, name: str) -> torch.Tensor | None:
        """The direction, as far as the parameter is here."""
        whole, part = self.direction.get(name), self.parts.get(name)
        return whole if whole is None or part is None else part.of(whole)

    def _looked_up(self, name: str, micro_batch: MicroBatch) -> list[torch.Tensor]:
        """Per prompt the distinct ids, sorted."""
        uses = micro_batch.embedding_ids[name]
        return [torch.unique(torch.cat([ids[slice(*spans[i])] for ids, spans in uses for i in places]))
                for _, places in micro_batch.groups]

    def _add(self, name: str, micro_batch: MicroBatch, grams: Sequence[torch.Tensor], dots: Sequence[torch.Tensor]
             ) -> None:
        device = grams[0].device
        if name not in self.grams:
            self.grams[name] = torch.zeros(self.n_responses, self.width, dtype=torch.float64, device=device)
            if name in self.direction:
                self.dots[name] = torch.zeros(self.n_responses, dtype=torch.float64, device=device)
        for which, rows in enumerate(micro_batch.index(device)[1]):
            self.grams[name][rows, :len(rows)] += grams[which]
            if dots:
                self.dots[name][rows] += dots[which]


def sketch_columns(shape: tuple[int, ...], k: int) -> int:
    """Floats in the sketch of a parameter: matrices are folded on two sides, vectors on one, others are not tracked."""
    if len(shape) not in (1, 2):
        return 0
    return min(shape[0], k**2) if len(shape) == 1 else min(shape[0], k) * min(shape[1], k)


class SketchCollector:
    """Sketches of all responses' gradients, per parameter: {name: [R, k_out * k_in] float32}. See ``Fold``.

    ``shapes`` are those of whole parameters; ``parts`` says what is here of those that are spread over ranks.
    """

    def __init__(self, rollouts: Rollouts, shapes: Mapping[str, tuple[int, ...]], *, k: int, seed: int,
                 direction: dict[str, torch.Tensor], parts: dict[str, Part] | None = None) -> None:
        self.n_responses, self.shapes, self.direction = rollouts.n_responses, shapes, direction
        self.k, self.seed = k, seed
        self.parts = {} if parts is None else parts
        self.sketches: dict[str, torch.Tensor] = {}
        self._folds: dict[tuple[str, str], Fold] = {}

    def fold(self, name: str, side: str, device: torch.device) -> Fold:
        """The map of one side of a parameter, as far as that is here."""
        if (name, side) not in self._folds:
            whole, part = self._whole_fold(name, side, device), self.parts.get(name)
            dim = int(side == "in")
            self._folds[name, side] = whole if part is None else whole.narrow(part.starts[dim], part.sizes[dim])
        return self._folds[name, side]

    def _whole_fold(self, name: str, side: str, device: torch.device) -> Fold:
        shape = self.shapes[name]
        d, k = (shape[0], self.k**2) if len(shape) == 1 else (shape[side == "in"], self.k)
        return Fold(d, k, seed=self.seed, name=name, side=side, device=device)

    def outer(self, name: str, micro_batch: MicroBatch, b: torch.Tensor, a: torch.Tensor, spans: Spans,
              want_gradient: bool = False) -> None:
        self._outer(name, micro_batch, self.fold(name, "out", b.device)(b), a, spans)

    def rows(self, name: str, micro_batch: MicroBatch, ids: torch.Tensor, b: torch.Tensor, spans: Spans) -> None:
        self._outer(name, micro_batch, self.fold(name, "out", b.device).rows(ids, b.dtype), b, spans)

    def vector(self, name: str, micro_batch: MicroBatch, values: torch.Tensor, spans: Spans) -> None:
        self._add(name, micro_batch, self.fold(name, "out", values.device)(span_sums(values, spans)))

    partial = vector  # sketches add up over ranks as they do over rows

    def flush(self, micro_batch: MicroBatch) -> None:
        """Nothing waits: sketches are linear in the uses of a parameter."""

    def dots(self, sketches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Per parameter the unbiased [R] estimate of ⟨direction, G_i⟩, from the sketches of whole gradients."""
        result = {}
        for name, sketch in sketches.items():
            if name not in self.direction:
                continue
            folded, fold = self.direction[name].double(), self._whole_fold(name, "out", sketch.device)
            if folded.ndim == 2:
                folded = self._whole_fold(name, "in", sketch.device)(folded)
            folded = fold(folded.T).T if folded.ndim == 2 else fold(folded)
            result[name] = sketch.double() @ folded.reshape(-1)
        return result

    def _outer(self, name: str, micro_batch: MicroBatch, b: torch.Tensor, a: torch.Tensor, spans: Spans) -> None:
        a = self.fold(name, "in", a.device)(a)
        self._add(name, micro_batch, span_products(b, a, spans))

    def _add(self, name: str, micro_batch: MicroBatch, values: torch.Tensor) -> None:
        if name not in self.sketches:
            self.sketches[name] = values.new_zeros(self.n_responses, values.shape[1])
        self.sketches[name].index_add_(0, micro_batch.index(values.device)[0], values)


def _added(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum; there is at least one."""
    return reduce(torch.add, terms)


def _complete(micro_batch: MicroBatch, name: str, kind: str) -> bool:
    return micro_batch.arrived[name, kind] >= micro_batch.calls[name, kind]
