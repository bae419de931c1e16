"""``ModelGap``: the gradient gap over all weights of a model, measured while a training step runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlvr_fast import _validate as check
from rlvr_fast.model_gap import attach, micro_batch, result
from rlvr_fast.model_gap.arguments import Arguments
from rlvr_fast.model_gap.collected import Collected
from rlvr_fast.model_gap.exact import ExactCollector, isolated_gradients
from rlvr_fast.model_gap.recording import Recording
from rlvr_fast.model_gap.response_totals import response_totals
from rlvr_fast.model_gap.result import Coverage, ModelGapResult
from rlvr_fast.model_gap.tap import Site
from rlvr_fast.model_gap.tensor_parallel.join import Join
from rlvr_fast.model_gap.tensor_parallel.witness import ShardWitness
from rlvr_fast.model_gap.witness import Witness
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.vocabulary_parallel import VocabularyShard


class ModelGap:
    """Context manager around the forwards and backwards of one training step.

    ::

        with rf.ModelGap(model, rollouts) as probe:
            for batch in micro_batches:
                loss(model(batch.input_ids)).backward()
        gap = probe.gap()

    **Responses.** Every forward of ``model`` with gradients enabled takes the next responses of ``rollouts``: B of them
    for input_ids [B, T], one per sequence for a packed [1, M] whose ``position_ids`` restart at 0 (or that comes with
    ``cu_seqlens`` / ``cu_seq_lens_q``). ``micro_batch`` says otherwise. Layers must see the batch first, [B, T, ...].
    All of ``rollouts`` must have passed through a forward and its backward before the context ends. Methods "segmented"
    and "ghost" need all responses of a prompt in one forward; "sketch" and "exact" take any split.

    **Which backward.** Where every token of response i has one coefficient c_i ≠ 0 in the loss (on-policy policy
    gradient; nothing clipped, no KL or entropy term), the training backward is c_i times that of log π(o_i). This is
    read off the gradient of the lm_head's logits, not assumed, and c_i is divided out. Prompts of one class may have
    c_i = 0; they have no gap. For any other loss call ``backward(logp)`` before the loss's own backward.

    **Several ranks.** ``model`` may be in a ``DistributedDataParallel`` or under ``fully_shard``; each rank's
    ``rollouts`` are its own responses. With ``group`` the result is about those of all its ranks, in rank order, bit
    for bit the same on each. Making the ModelGap is collective then (a few words on the host), and so is the first use
    of ``gap()`` or ``coverage``: one all-gather of what the step added, [R, parameters, group size] float64 inner
    products or [R, K] float32 sketches. Prompts are told apart by ``prompt_ids`` across the ranks; rollouts with
    ``group_size``, which counts them from 0 on each, are refused on more than one rank. But for "sketch" a prompt must
    be whole on one rank. Coefficients are those in each rank's own loss, before gradients are averaged; ``coverage``
    looks at ``param.grad`` as the context leaves it: averaged, or else at the mean of the ranks' norms.

    **Ranks that share layers.** Layers under ``parallelize_module`` (column- and row-parallel linear layers and
    embeddings, norms of a sequence-parallel region) are found by their DTensors, a loop's own lm_head whose rows are
    plain tensors on each rank by ``vocabulary``. These ranks hold the same responses, making the ModelGap and the first
    ``gap()`` are collective among them, and the latter gives all of them the result of one rank with the whole model:
    one all-reduce of what the step added, besides the all-gather over ``group``, which on a mesh of two dimensions is
    the data-parallel one. Inner products of shards add up, what every rank holds whole counts once, gradients that are
    sums over the ranks' tokens are added before they are squared; sketches are those of the whole weight for any
    number of ranks. With DTensors data parallelism is ``fully_shard`` or the loop's own.

    **Precision.** Inner products are formed from float32 products (float64 for a float64 model) and added in float64.
    Gradients of "sketch", "ghost" and "exact" are those of a plain backward, bit by bit; "segmented" forms the weight
    gradients of linear layers itself, response by response, so they differ by the order of summation.

    Args:
        model: a plain eager model in this process, or in one of the two engines above; parameters that require no
            gradient (a LoRA base) are left alone.
        rollouts: the responses, in the order in which the forwards hold them.
        method: "segmented" forms per-response weight gradients block by block inside the ordinary backward (or takes
            the tokens' Gram where that is clearly cheaper); "ghost" always takes the tokens' Gram; "sketch" keeps a
            [k, k] CountSketch of every weight's gradient per response; "exact" runs a backward per response from
            ``backward(logp)``.
        length_norm: divide each response's gradient by its length, as in ``gradient_gap``.
        temperature: the one the logits are divided by in the loss, for reading c_i.
        lm_head: the module that makes the logits; by default ``model.get_output_embeddings()`` or what is called
            ``lm_head``.
        sketch_size, seed: k and the seed of the hash, for "sketch".
        direction: {parameter or its name: plain tensor of its whole shape}, the update whose alignment with each gap is
            wanted.
        group: the ranks whose responses are measured together (``torch.distributed.group.WORLD``, say), all with the
            same model and options; None for this rank's own. A model under ``fully_shard`` needs it, to be all ranks of
            its (data-parallel) mesh. Ranks that share layers do not belong to it: these are found. What is raised on
            one rank is raised on all, but for errors in the context.
        vocabulary: which rows of the lm_head this rank holds, where the loop itself spreads them over ranks and makes
            its loss of the ranks' logits (and sums the gradients of the hidden states).

    Raises:
        ValueError, TypeError, RuntimeError: before anything is replaced, if the model cannot be measured; in a forward
            that does not fit the rollouts; in ``gap``, for all that only the backward can tell.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, method: str = "segmented", *, length_norm: bool = True,
                 temperature: float = 1.0, lm_head: nn.Module | None = None, sketch_size: int = 32, seed: int = 0,
                 direction: Mapping[Any, torch.Tensor] | None = None, group: dist.ProcessGroup | None = None,
                 vocabulary: VocabularyShard | None = None) -> None:
        given = Arguments(model, rollouts, method, length_norm, temperature, lm_head, sketch_size, seed, direction,
                          group, vocabulary)
        self._ranks = given.validate()
        self.model, self.rollouts, self.method = given.model, given.rollouts, given.method
        self.length_norm, self.temperature = given.length_norm, given.temperature
        self._given, self._parameters, self._spread = given, given.parameters, given.spread
        self._state = "new"
        self._reasons: dict[str, str] = {}
        self._norm_sq: dict[str, torch.Tensor] = {}
        self._probe_norm_sq: dict[str, torch.Tensor] = {}
        self._partial_gradients: dict[str, torch.Tensor] = {}
        self._result: ModelGapResult | None = None

    # -- the context --------------------------------------------------------------------------------------------------

    def __enter__(self) -> ModelGap:
        if self._state != "new":
            raise RuntimeError("a ModelGap measures one step: make a new one")
        attach.reshard(self.model)
        attach.check_model(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter is not self._parameters.get(name, parameter):
                raise RuntimeError(f"{name} is another parameter than when the ModelGap was made: make it last")
        given = self._given
        self._recording = Recording(self.rollouts, self.method, given.new_collector(), given.lm_head, self.temperature)
        sites: list[Site] = []
        if self.method != "exact":
            names = {id(p): name for name, p in self._parameters.items()}
            sites, self._reasons = attach.find_sites(self._recording, self.model, names, given.lm_head, self._spread)
            if not {name for site in sites for name in site.parameters.values()} - self._reasons.keys():
                raise ValueError(f"model has no trainable parameter that can be tracked: {self._reasons}")
        tracked = {name: self._parameters[name] for site in sites for name in site.parameters.values()}
        self._recording.witness = (Witness(tracked, self.rollouts) if self._spread is None else
                                   ShardWitness(tracked, self.rollouts, self._spread))
        self._replaced = [attach.Replacement(site.module, site.forward) for site in sites]
        whole, run = self.model.forward, self._recording.run_model
        self._replaced.append(attach.Replacement(self.model, lambda *args, **kwargs: run(whole, args, kwargs)))
        self._state = "open"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._recording.witness.close()
        self._recording.open = False
        self._state = "closed" if kind is None else "failed"
        if kind is None:
            self._recording.flush()
            gradients = self._gradients()
            if self._spread is not None:
                self._partial_gradients = {name: self._spread.local_gradient(name, self._parameters[name], g).clone()
                                           for name, g in gradients.items() if self._spread.is_partial(g)}
            whole = {name: g for name, g in gradients.items() if name not in self._partial_gradients}
            self._norm_sq = attach.gradient_norm_sq(whole) or self._probe_norm_sq

    @contextmanager
    def micro_batch(self, responses: Sequence[int] | None = None, *, input_ids: torch.Tensor | None = None,
                    cu_seqlens: torch.Tensor | None = None) -> Iterator[None]:
        """Say which responses the forwards inside hold, for loops that call parts of the model or reorder responses.

        Args:
            responses: their numbers in the rollouts, in row order; by default the next ones.
            input_ids: [B, T], or [1, M] packed. Without them, and without ``cu_seqlens``, layers must keep a leading
                dimension B, and coefficients can be read only off an lm_head that sees just the response tokens.
            cu_seqlens: [B + 1], borders of the packed sequences, prompts included.
        """
        self._check_open("micro_batch")
        bounds = shape = None
        if input_ids is not None:
            height, width = check.tensor("input_ids", input_ids, ndim=2, dtypes=check.INTEGER_DTYPES).shape
            shape = height, width
        if cu_seqlens is not None:
            bounds = tuple(check.tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=check.INTEGER_DTYPES).tolist())
            shape = shape or (1, bounds[-1] if bounds else 0)
        if responses is None:
            if shape is None:
                raise ValueError("give at least one of responses, input_ids and cu_seqlens")
            count = shape[0] if bounds is None else len(bounds) - 1
            seen = len(self._recording.seen)
            responses = range(seen, seen + count)
        responses = [int(i) for i in responses]
        if any(not 0 <= i < self.rollouts.n_responses for i in responses):
            raise ValueError(f"responses must be in [0, {self.rollouts.n_responses}), got {check.describe(responses)}")
        batch = micro_batch.make(self.rollouts, responses, input_ids, shape or (len(responses), 0), bounds)
        with self._recording.forward(batch):
            yield

    def backward(self, logp: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Back-propagate Σ_i log π(o_i) of the latest forward, leaving every ``param.grad`` and the graph as they are.

        Needs memory for one more gradient of the model while it runs. The loss's own backward is not looked at then.

        Args:
            logp: log-probs of the response tokens with their graph: [B, T'] with ``mask``, or in rollout order [N_m],
                or in the layout of the rollouts if the forward held all of them.
            mask: [B, T'] bool or 0/1, true on the tokens of each response.
        """
        self._check_open("backward")
        if not self._recording.forwards:
            raise RuntimeError("backward needs a forward of the model inside the context, got none")
        batch = self._recording.forwards[-1]
        if batch.captured:
            raise RuntimeError("the latest forward was measured already: probe.backward comes once, before the loss's")
        totals = response_totals(self.rollouts, batch, logp, mask)
        collector = self._recording.collector
        if isinstance(collector, ExactCollector):
            collector.collect(batch, totals, self._parameters)
            batch.probed = batch.captured = True
            return
        with self._recording.probe(batch):
            norms = self._probe_norms(sum(totals[1:], totals[0]))
        for name, value in norms.items():
            self._probe_norm_sq[name] = self._probe_norm_sq.get(name, 0.0) + value
        collector.flush(batch)

    def _probe_norms(self, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the probe backward; squared norms of its gradients."""
        if self._given.in_ddp:  # where a gradient that is accumulated counts as the step's
            gradients = torch.autograd.grad(total, list(self._parameters.values()), retain_graph=True,
                                            allow_unused=True)
            return attach.gradient_norm_sq({name: gradient for name, gradient in zip(self._parameters, gradients,
                                                                                     strict=True)
                                            if gradient is not None})
        with isolated_gradients(self._parameters):
            total.backward(retain_graph=True)
            return attach.gradient_norm_sq(self._gradients())

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """"training", "probe" or "mixed": the backward passes that the gradients were taken from."""
        return self._recording.source

    @property
    def coverage(self) -> Coverage:
        """Share of the gradient that the tracked parameters carry, and why the others are not tracked."""
        return self.gap().coverage

    def gap(self) -> ModelGapResult:
        """The gap of every prompt. Call it after the context; the first call synchronises.

        Raises:
            RuntimeError: if responses went through no backward, or the training backward says nothing about ∇log π.
        """
        if self._result is None:
            self._result = self._estimate()
        return self._result

    def _estimate(self) -> ModelGapResult:
        own = self._collected() if self._ranks is None else self._ranks.joined(self._collected)
        own.check_measured()
        sketched = self.method == "sketch"
        return result.build(
            own.rollouts, method=self.method, source=own.source, length_norm=self.length_norm,
            coefficients=own.coefficients, coverage=Coverage(tuple(own.tables), own.reasons, own.norm_sq),
            grams=None if sketched else own.tables, sketches=own.tables if sketched else None, dots=own.dots,
            direction=bool(self._given.directions))

    def _collected(self) -> Collected:
        if self._state != "closed":
            raise RuntimeError({"new": "gap() comes after the training step: with probe: ...",
                                "open": "gap() comes after the with block",
                                "failed": "the with block ended in an error, nothing was measured"}[self._state])
        join = None
        if self._spread is not None:
            join = Join(self._spread, self.rollouts, self._parameters, self._given.columns,
                        list(self._given.directions), self._recording.forwards)
        return Collected.of(self._recording, list(self._parameters), self._reasons, self._norm_sq,
                            gradients=self._partial_gradients, join=join)

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}

    def _check_open(self, what: str) -> None:
        if self._state != "open":
            raise RuntimeError(f"probe.{what} belongs inside the with block")

    def __repr__(self) -> str:
        return f"ModelGap({type(self.model).__name__}, method={self.method}, {self._state}, {self.rollouts!r})"
