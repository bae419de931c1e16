"""One gap out of what tensor-parallel ranks have of the same responses: a single all-reduce of one flat buffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rlvr_fast.distributed import REFUSED, raise_refusals
from rlvr_fast.model_gap.coefficients import HeadRows
from rlvr_fast.model_gap.collect import vector_products
from rlvr_fast.model_gap.micro_batch import MicroBatch
from rlvr_fast.model_gap.segmented import accumulation_dtype
from rlvr_fast.model_gap.tensor_parallel.head import sample_width
from rlvr_fast.model_gap.tensor_parallel.layers import PARTIAL, WHOLE, TensorParallel
from rlvr_fast.rollouts import Rollouts

WORDS = 2048  # bytes in which a rank says why it refuses, or why parameters are not covered
AGREEMENT = 1e-3  # how far, relative, what every rank holds whole may differ between ranks: rounding, on some devices


@dataclass(eq=False)
class Terms:
    """What one rank has of a step, and afterwards what all have together.

    Attributes:
        tables: parameter -> [R, n_max] inner products or [R, K] sketches.
        vectors: parameter -> [R, d], gradients that are partial sums.
        dots: parameter -> [R] float64, inner products with the direction.
        reasons: parameter -> why it is not covered.
        norm_sq: parameter -> squared norm of its gradient, as in ``attach.gradient_norm_sq``.
        gradients: parameter -> [d], of parameters whose gradients are partial sums.
    """

    tables: dict[str, torch.Tensor]
    dots: dict[str, torch.Tensor]
    reasons: dict[str, str]
    norm_sq: dict[str, torch.Tensor]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Join:
    """The buffer of one step: sums over the ranks, and slots that each fills for itself.

    Args:
        names: the trainable parameters.
        columns: per parameter the width of its sketches; None for inner products.
        forwards: the micro-batches of the step.
    """

    def __init__(self, spread: TensorParallel, rollouts: Rollouts, parameters: dict[str, torch.nn.Parameter],
                 columns: dict[str, int] | None, directed: list[str],
                 forwards: list[MicroBatch]) -> None:
        self.spread, self.rollouts, self.names, self.directed = spread, rollouts, list(parameters), directed
        longest = max(map(len, rollouts.members))
        self.widths = [longest if columns is None else columns[name] for name in self.names]
        self.lengths = [spread.shapes[name][0] for name in spread.replicated]
        self.sketched = columns is not None
        dtypes = {accumulation_dtype(p.dtype) for p in parameters.values()}
        dtype = torch.float32 if self.sketched and torch.float64 not in dtypes else torch.float64
        n, total, n_responses = len(self.names), sum(self.lengths), rollouts.n_responses
        rows = sum(max(batch.bounds[-1], batch.n_tokens) for batch in forwards)
        shapes = {"tables": (n_responses, sum(self.widths)), "vectors": (0 if self.sketched else n_responses, total),
                  "gradients": (total,), "norm_sq": (n,), "there": (n,), "dots": (len(directed), n_responses),
                  "samples": (rows, sample_width(rollouts)), "prints": (spread.size, n), "reasons": (spread.size, n),
                  "words": (spread.size, WORDS)}
        device = next(iter(parameters.values())).device
        self.buffer = torch.zeros(sum(torch.Size(shape).numel() for shape in shapes.values()), dtype=dtype,
                                  device=device)
        pieces = self.buffer.split([torch.Size(shape).numel() for shape in shapes.values()])
        self.view = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def check(self) -> None:
        """Raise if this rank's terms have no place in the buffer."""
        rows = sum(len(head.terms) for head in self.spread.heads)
        if rows > len(self.view["samples"]):
            raise RuntimeError(f"the lm_head saw {rows} rows, the forwards hold {len(self.view['samples'])}: it may "
                               "run once in a forward")

    def refuse(self, error: Exception) -> None:
        """Take part only to tell the others that this rank raises ``error``."""
        self._say(REFUSED + str(error))
        dist.all_reduce(self.buffer, group=self.spread.group)

    def total(self, own: Terms, direction: dict[str, torch.Tensor]) -> Terms:
        """What all ranks have together, the same on each. Collective: one all-reduce.

        Raises:
            ValueError: if another rank refused.
            RuntimeError: if no parameter is covered on every rank.
        """
        distinct = list(dict.fromkeys(own.reasons.values()))
        self._fill(own, distinct)
        self._say("\n".join(distinct))
        dist.all_reduce(self.buffer, group=self.spread.group)
        words = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self.view["words"].byte().tolist()]
        raise_refusals(words)
        reasons = self._reasons(words)
        tables, dots = self._tables(reasons), self._dots(reasons)
        if not self.sketched:
            vectors = zip(self.spread.replicated, self.view["vectors"].split(self.lengths, 1), strict=True)
            for name, rows in vectors:
                if name in tables and self._kind(name) == PARTIAL:
                    tables[name], along = vector_products(self.rollouts, rows, direction.get(name))
                    if along is not None:
                        dots[name] = along
        return Terms(tables, dots, reasons, self._norms())

    # -- this rank's terms --------------------------------------------------------------------------------------------

    def _kind(self, name: str) -> str:
        part = self.spread.parts.get(name)
        return WHOLE if part is None else part.kind

    def _share(self, name: str) -> float:
        """What all ranks hold whole counts once in their sum."""
        return 1.0 / self.spread.size if self._kind(name) == WHOLE else 1.0

    def _fill(self, own: Terms, distinct: list[str]) -> None:
        rank = self.spread.rank
        for i, (name, table) in enumerate(zip(self.names, self.view["tables"].split(self.widths, 1), strict=True)):
            if name in own.reasons:
                self.view["reasons"][rank, i] = 1 + distinct.index(own.reasons[name])
            elif name in own.tables:
                table += own.tables[name] * self._share(name)
                if self._kind(name) == WHOLE:
                    self.view["prints"][rank, i] = torch.linalg.vector_norm(own.tables[name])
            if name in own.norm_sq:
                plain_shard = name in self.spread.own_rows  # of others the norm is that of the whole, on average
                self.view["norm_sq"][i] = own.norm_sq[name] / (1 if plain_shard else self.spread.size)
            if name in own.norm_sq or name in own.gradients:
                self.view["there"][i] = 1.0
        for name, row in zip(self.directed, self.view["dots"], strict=True):
            if name in own.dots:
                row += own.dots[name] * self._share(name)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        for name, start, stop in zip(self.spread.replicated, ends[:-1], ends[1:], strict=True):
            if name in own.vectors:
                self.view["vectors"][:, start:stop] = own.vectors[name]
            if name in own.gradients:
                self.view["gradients"][start:stop] = own.gradients[name]
        start = 0
        for head in self.spread.heads:
            stop = start + len(head.terms)
            self.view["samples"][start:stop] = head.terms
            start = stop

    def _say(self, text: str) -> None:
        said = text.encode()[:WORDS]
        self.view["words"][self.spread.rank, :len(said)] = torch.tensor(list(said), dtype=self.buffer.dtype)

    # -- the ranks' sum -----------------------------------------------------------------------------------------------

    def _reasons(self, words: list[str]) -> dict[str, str]:
        """A parameter is covered where it is on every rank, and where what all hold whole is the same."""
        reasons = {}
        codes, prints = self.view["reasons"].long().T.tolist(), self.view["prints"]
        differs = (prints.amax(0) - prints.amin(0) > AGREEMENT * prints.amax(0)).tolist()
        for name, own, different in zip(self.names, codes, differs, strict=True):
            rank = next((rank for rank, code in enumerate(own) if code), None)
            if rank is not None:
                listed = dict(enumerate(words[rank].split("\n"), 1))
                where = "" if all(own) else f" (on tensor-parallel rank {rank})"
                reasons[name] = listed.get(own[rank], "it is not covered") + where
            elif different:
                reasons[name] = ("its gradient is not the same on all tensor-parallel ranks, which hold all of it (a "
                                 "plain module that sees some of the heads or tokens? SequenceParallel says so)")
        if len(reasons) == len(self.names):
            raise RuntimeError(f"no parameter is covered on every tensor-parallel rank: {reasons}")
        return reasons

    def _tables(self, reasons: dict[str, str]) -> dict[str, torch.Tensor]:
        tables = zip(self.names, self.view["tables"].split(self.widths, 1), strict=True)
        return {name: table for name, table in tables if name not in reasons}

    def _dots(self, reasons: dict[str, str]) -> dict[str, torch.Tensor]:
        return {name: row for name, row in zip(self.directed, self.view["dots"], strict=True) if name not in reasons}

    def _norms(self) -> dict[str, torch.Tensor]:
        norms = {name: value.double() for name, value in zip(self.names, self.view["norm_sq"], strict=True)}
        there = self.view["there"].tolist()
        for name, gradient in zip(self.spread.replicated, self.view["gradients"].split(self.lengths), strict=True):
            norms[name] = norms[name] + gradient.double().square().sum()
        return {name: value for (name, value), yes in zip(norms.items(), there, strict=True) if yes}

    def heads(self) -> list[HeadRows]:
        """What the lm_head saw, from the samples of all ranks."""
        sizes = [len(head.terms) for head in self.spread.heads]
        samples = self.view["samples"][:sum(sizes)].split(sizes)
        return [head.complete(terms) for head, terms in zip(self.spread.heads, samples, strict=True)]
