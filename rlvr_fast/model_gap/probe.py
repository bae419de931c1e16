"""``ModelGap``: the gradient gap over all weights of a model, measured while a training step runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from rlvr_fast import _validate as check
from rlvr_fast.model_gap import attach, micro_batch, parallel, result
from rlvr_fast.model_gap.collect import GramCollector, SketchCollector, sketch_columns
from rlvr_fast.model_gap.collected import Collected
from rlvr_fast.model_gap.exact import ExactCollector, isolated_gradients
from rlvr_fast.model_gap.recording import Recording
from rlvr_fast.model_gap.response_totals import response_totals
from rlvr_fast.model_gap.result import Coverage, ModelGapResult
from rlvr_fast.model_gap.witness import Witness
from rlvr_fast.rollouts import Rollouts

METHODS = ("segmented", "ghost", "sketch", "exact")


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
    products or [R, K] float32 sketches. Prompts are told apart by ``prompt_ids`` across the ranks (``group_size``
    numbers them from 0 on each, so give ids). But for "sketch" a prompt must be whole on one rank. Coefficients are
    those in each rank's own loss, before gradients are averaged; ``coverage`` looks at ``param.grad`` as the context
    leaves it: averaged, or else at the mean of the ranks' norms.

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
        direction: {parameter or its name: tensor of its shape}, the update whose alignment with each gap is wanted.
        group: the ranks whose responses are measured together (``torch.distributed.group.WORLD``, say), all with the
            same model and options; None for this rank's own. A model under ``fully_shard`` needs it, to be all ranks of
            its mesh. What is raised on one rank is raised on all, but for errors in the context.

    Raises:
        ValueError, TypeError, RuntimeError: before anything is replaced, if the model cannot be measured; in a forward
            that does not fit the rollouts; in ``gap``, for all that only the backward can tell.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, method: str = "segmented", *, length_norm: bool = True,
                 temperature: float = 1.0, lm_head: nn.Module | None = None, sketch_size: int = 32, seed: int = 0,
                 direction: dict | None = None, group: dist.ProcessGroup | None = None) -> None:
        with parallel.refusals_told(group):
            self._check(model, rollouts, method, length_norm, temperature, lm_head, sketch_size, seed, direction)
            attach.check_group(self._parameters, group)
        self._ranks = None if group is None else self._join(group)
        self._state = "new"
        self._reasons: dict[str, str] = {}
        self._norm_sq: dict[str, torch.Tensor] = {}
        self._probe_norm_sq: dict[str, torch.Tensor] = {}
        self._result: ModelGapResult | None = None

    def _check(self, model, rollouts, method, length_norm, temperature, lm_head, sketch_size, seed, direction) -> None:
        self._in_ddp, model = attach.unwrapped(model) is not model, attach.unwrapped(model)
        attach.reshard(model)
        attach.check_model(model)
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts must be rlvr_fast.Rollouts, got {type(rollouts).__name__}")
        if rollouts.n_responses == 0:
            raise ValueError("rollouts must hold at least one response, got none")
        device = next(model.parameters()).device
        if rollouts.device != device:
            raise ValueError(f"rollouts must be on {device}, where the model is, got {rollouts.device}")
        self.method = check.choice("method", method, METHODS)
        self.length_norm = check.flag("length_norm", length_norm)
        self.temperature = check.positive("temperature", temperature)
        if isinstance(sketch_size, bool) or not isinstance(sketch_size, int) or sketch_size < 2:
            raise ValueError(f"sketch_size must be an int of at least 2, got {check.describe(sketch_size)}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {check.describe(seed)}")
        self.model, self.rollouts = model, rollouts
        self._sketch_size, self._seed = sketch_size, seed
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._lm_head = attach.find_lm_head(model, lm_head)
        self._direction = attach.check_direction(direction, self._parameters)
        if method == "exact" and (self._in_ddp or any(map(attach.is_sharded, self._parameters.values()))):
            raise ValueError("method 'exact' runs a backward per response, each of which DistributedDataParallel or "
                             "fully_shard would take for the step's: pass another method, or a model without them")

    def _join(self, group: dist.ProcessGroup) -> parallel.Ranks:
        columns = None
        if self.method == "sketch":
            columns = {name: sketch_columns(p.shape, self._sketch_size) for name, p in self._parameters.items()}
        options = f"{self.method} size {self._sketch_size} seed {self._seed}, length_norm {self.length_norm}"
        return parallel.Ranks(group, self.rollouts, self._parameters, columns=columns, directed=self._direction,
                              options=options)

    # -- the context --------------------------------------------------------------------------------------------------

    def __enter__(self) -> ModelGap:
        if self._state != "new":
            raise RuntimeError("a ModelGap measures one step: make a new one")
        attach.reshard(self.model)
        attach.check_model(self.model)
        self._recording = Recording(self.rollouts, self.method, self._new_collector(), self._lm_head, self.temperature)
        sites = []
        if self.method != "exact":
            names = {id(p): name for name, p in self._parameters.items()}
            sites, self._reasons = attach.find_sites(self._recording, self.model, names, self._lm_head)
            if not {name for site in sites for name in site.parameters.values()} - self._reasons.keys():
                raise ValueError(f"model has no trainable parameter that can be tracked: {self._reasons}")
        tracked = {name: self._parameters[name] for site in sites for name in site.parameters.values()}
        self._recording.witness = Witness(tracked, self.rollouts)
        self._replaced = [attach.Replacement(site.module, site.forward) for site in sites]
        whole, run = self.model.forward, self._recording.run_model
        self._replaced.append(attach.Replacement(self.model, lambda *args, **kwargs: run(whole, args, kwargs)))
        self._state = "open"
        return self

    def _new_collector(self) -> GramCollector | SketchCollector | ExactCollector:
        shapes = {name: p.shape for name, p in self._parameters.items()}
        if self.method == "exact":
            return ExactCollector(self.rollouts, self._direction)
        if self.method == "sketch":
            return SketchCollector(self.rollouts, shapes, k=self._sketch_size, seed=self._seed,
                                   direction=self._direction)
        return GramCollector(self.rollouts, shapes, ghost=self.method == "ghost", direction=self._direction)

    def __exit__(self, kind, error, traceback) -> None:
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._recording.witness.close()
        self._recording.open = False
        self._state = "closed" if kind is None else "failed"
        if kind is None:
            self._recording.flush()
            self._norm_sq = self._gradient_norms() or self._probe_norm_sq

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
            shape = tuple(check.tensor("input_ids", input_ids, ndim=2, dtypes=check.INTEGER_DTYPES).shape)
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
        if self.method == "exact":
            self._recording.collector.collect(batch, totals, self._parameters)
            batch.probed = batch.captured = True
            return
        with self._recording.probe(batch):
            norms = self._probe_norms(sum(totals))
        for name, value in norms.items():
            self._probe_norm_sq[name] = self._probe_norm_sq.get(name, 0.0) + value
        self._recording.collector.flush(batch)

    def _probe_norms(self, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the probe backward; squared norms of its gradients."""
        if self._in_ddp:  # where a gradient that is accumulated counts as the step's
            gradients = torch.autograd.grad(total, list(self._parameters.values()), retain_graph=True,
                                            allow_unused=True)
            return attach.gradient_norm_sq({name: gradient for name, gradient in zip(self._parameters, gradients,
                                                                                     strict=True)
                                            if gradient is not None})
        with isolated_gradients(self._parameters):
            total.backward(retain_graph=True)
            return self._gradient_norms()

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
        tables = {"grams": own.tables, "sketches": None}
        if self.method == "sketch":
            tables = {"grams": None, "sketches": own.tables}
        return result.build(
            own.rollouts, method=self.method, source=own.source, length_norm=self.length_norm,
            coefficients=own.coefficients, coverage=Coverage(tuple(own.tables), own.reasons, own.norm_sq), **tables,
            dots=own.dots, direction=bool(self._direction))

    def _collected(self) -> Collected:
        if self._state != "closed":
            raise RuntimeError({"new": "gap() comes after the training step: with probe: ...",
                                "open": "gap() comes after the with block",
                                "failed": "the with block ended in an error, nothing was measured"}[self._state])
        return Collected.of(self._recording, list(self._parameters), self._reasons, self._norm_sq)

    def _gradient_norms(self) -> dict[str, torch.Tensor]:
        return attach.gradient_norm_sq({name: p.grad for name, p in self._parameters.items() if p.grad is not None})

    def _check_open(self, what: str) -> None:
        if self._state != "open":
            raise RuntimeError(f"probe.{what} belongs inside the with block")

    def __repr__(self) -> str:
        return f"ModelGap({type(self.model).__name__}, method={self.method}, {self._state}, {self.rollouts!r})"
