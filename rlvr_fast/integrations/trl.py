"""Gradient-gap metrics in the logs of TRL's GRPOTrainer, by one line: ``instrument(trainer)``.

Nothing of TRL is replaced: methods of this one trainer object are wrapped, and every wrapper returns what the original
did. Training is bitwise the same with and without. What is used of TRL, all of it in releases 1.0 to 1.16:

    _calculate_rewards                    the rewards of all processes, before advantages hide them
    _generate_and_score_completions      adds reward, prompt and success rate of each completion to the batch, whose
                                          tensors TRL shuffles and splits together
    compute_loss                          a micro-batch begins and ends
    _get_per_token_logps_and_entropies    log-probs and entropies of the micro-batch
    _metrics["train"]                     what ``log`` averages and sends to every logger
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from rlvr_fast.gap import gradient_gap
from rlvr_fast.integrations.causal_lm import HiddenStates, NotMeasurable, base_model
from rlvr_fast.monitor import GapMonitor
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.guard import StepGuard

if TYPE_CHECKING:
    from trl import GRPOTrainer

SEQUENCE_MEAN_LOSSES = ("grpo", "sapo")  # 1/|o| on every token; the others weigh all tokens of the batch alike
ESTIMATORS = {"group": "grpo", True: "grpo", "batch": "grpo_batch_std", "none": "dr_grpo", False: "dr_grpo"}
REWARD, PROMPT, SUCCESS_RATE = "rlvr_reward", "rlvr_prompt", "rlvr_success_rate"


def instrument(trainer: GRPOTrainer, *, level: str | None = "hidden", threshold: float | None = None, every: int = 1,
               budget: float | None = 0.03, decay: float | None = 0.9, guard: StepGuard | None = None) -> GRPOTrainer:
    """Log gradient-gap metrics (``rlvr/...``) with every optimizer step that ``trainer`` takes.

    Call it before ``trainer.train()``. Groups that straddle micro-batches and processes are put together; the metrics
    are those of the whole step. ``trainer.gap_monitor`` is the monitor, for ``state_dict`` and the like.

    Args:
        trainer: a GRPOTrainer, on a full model or a PEFT adapter.
        level: parameters that the gap belongs to, "hidden" or "logits": one head pass over the micro-batch's completion
            tokens, and one synchronisation of host and device. None: no gap; what log-probs, entropies and, from TRL
            1.16 on, Σp² of its fused head tell, which costs next to nothing. Where the model's head cannot be measured
            (vision-language models, ZeRO-3 shards, logits scaled before a softcap) a warning says so, and None is what
            is done.
        threshold: completions whose weighted sum of rewards is at least this are the correct ones; needed where that
            sum is not 0 or 1.
        every, budget, decay: see ``GapMonitor``.
        guard: the StepGuard that the trainer was given as its optimizer (``optimizers=(guard, None)``), in mode "warn"
            or "scale". When it is due it observes the fresh completions of a generation (three forward passes, in
            evaluation mode, with the weights moved and put back); its metrics are logged too. With several processes
            its meter must reduce over them. Not for sharded weights.

    Returns:
        The trainer.

    Raises:
        TypeError: for something that has not the methods above.
        ValueError: for a trainer that is instrumented already, an unknown level, a guard that is not the optimizer or
            would measure on one process alone; in training, from the first rewards on, for rewards that are neither 0
            nor 1 without a threshold.
    """
    wanted = ("_calculate_rewards", "_generate_and_score_completions", "_get_per_token_logps_and_entropies",
              "compute_loss", "_metrics", "add_callback")
    missing = [name for name in wanted if not hasattr(trainer, name)]
    if missing:
        raise TypeError(f"trainer must be a GRPOTrainer of TRL 1.0 or later, got {type(trainer).__name__} without "
                        f"{', '.join(missing)}")
    if hasattr(trainer, "gap_monitor"):
        raise ValueError("trainer must not be instrumented twice")
    if level not in ("hidden", "logits", None):
        raise ValueError(f"level must be 'hidden', 'logits' or None, got {level!r}")
    if guard is not None and (not isinstance(guard, StepGuard) or trainer.optimizer is not guard):
        raise ValueError("guard must be the StepGuard that is the trainer's optimizer: GRPOTrainer(..., "
                         f"optimizers=(guard, None)); got {type(guard).__name__}, the optimizer is "
                         f"{type(trainer.optimizer).__name__}")
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and guard is not None and guard.meter.reduce is None:
        raise ValueError("guard must measure over all processes: StepGuard(..., share=None, meter=StepMeter("
                         "smoothing=0.5, reduce=torch.distributed.all_reduce)); its meter reduces nothing, and every "
                         "process would take steps of its own length")
    trainer.gap_monitor = GapMonitor(
        level=level or "hidden", length_norm=trainer.loss_type in SEQUENCE_MEAN_LOSSES, threshold=threshold,
        estimator=ESTIMATORS[trainer.scale_rewards], every=every, budget=budget, decay=decay,
        group=dist.group.WORLD if several else None)
    trainer.add_callback(_Instrument(trainer, trainer.gap_monitor, level, guard))
    return trainer


@dataclass
class _Seen:
    """What one micro-batch's loss has shown so far."""

    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    log_sum_p_sq: list[torch.Tensor] = field(default_factory=list)


class _Instrument(TrainerCallback):
    """The wrappers around one trainer's methods, and the callback that ends a window."""

    def __init__(self, trainer: GRPOTrainer, monitor: GapMonitor, level: str | None, guard: StepGuard | None) -> None:
        self.trainer, self.monitor, self.guard = trainer, monitor, guard
        args = trainer.args  # whether a generation's completions are used in later windows, too: one may be measured
        own = args.steps_per_generation * trainer.num_iterations
        self._in_later_windows = args.gradient_accumulation_steps % own != 0
        self._rewards: torch.Tensor | None = None  # [all processes' completions, reward functions]
        self._first_prompt = 0  # the number of the next prompt, over all processes
        self._seen: _Seen | None = None
        self._hidden: HiddenStates | None = None
        if level is not None:
            try:
                self._hidden = HiddenStates(trainer.model, trainer.temperature, self._see_hidden)
            except NotMeasurable as reason:
                self._give_up(reason)
        if self._hidden is None:
            self._ask_for_sum_p_sq()
        for name, wrapper in (("_calculate_rewards", self._calculate_rewards),
                              ("_generate_and_score_completions", self._generate_and_score),
                              ("_get_per_token_logps_and_entropies", self._get_logps),
                              ("compute_loss", self._compute_loss)):
            _wrap(trainer, name, wrapper)

    # -- completions: their rewards and prompts, before they are shuffled ----------------------------------------------

    def _calculate_rewards(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards = original(*args, **kwargs)
        return self._rewards

    def _generate_and_score(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = original(*args, **kwargs)
        if self.trainer.model.training:
            guard = self.guard if self.guard is not None and self.guard.due else None
            if self.monitor.due or self._in_later_windows or guard:
                with self.monitor.timed():
                    batch |= self._labels(len(batch["completion_ids"]))
            if guard is not None:
                self._observe(guard, batch)
        return batch

    def _labels(self, n: int) -> dict[str, torch.Tensor]:
        """Reward, prompt and group success rate of this process's ``n`` completions: [n] each."""
        rewards, size = self._rewards, self.trainer.num_generations
        assert rewards is not None
        weights = self.trainer.reward_weights.to(rewards.device)
        # A completion that no reward function scores has none.
        total = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))
        threshold = self.monitor.threshold
        verdict = total if threshold is None else torch.where(total.isnan(), total, (total >= threshold).to(total))
        index = torch.arange(len(total), device=total.device) // size
        rate = verdict.view(-1, size).nanmean(1)[index]
        prompt = index + self._first_prompt
        self._first_prompt += len(total) // size
        own = slice(self.trainer.accelerator.process_index * n, (self.trainer.accelerator.process_index + 1) * n)
        return {REWARD: total[own], PROMPT: prompt[own], SUCCESS_RATE: rate[own]}

    def _observe(self, guard: StepGuard, batch: dict[str, Any]) -> None:
        """Let the guard measure where the last step ended, on this process's scored completions."""
        trainer, model = self.trainer, self.trainer.model
        scored = ~batch[REWARD].isnan()
        ids, mask = batch["completion_ids"][scored], _loss_mask(batch)[scored]
        rollouts = Rollouts.from_padded(ids, mask, batch[REWARD][scored], prompt_ids=batch[PROMPT][scored],
                                        threshold=self.monitor.threshold)
        sequences = torch.cat([batch["prompt_ids"][scored], ids], 1)
        attention = torch.cat([batch["prompt_mask"][scored], batch["completion_mask"][scored]], 1)

        def logp_fn() -> torch.Tensor:  # without gradients: ``observe`` sees to it
            return trainer._get_per_token_logps_and_entropies(
                model, sequences, attention, ids.shape[1], batch_size=trainer.args.per_device_train_batch_size)[0]

        model.eval()
        try:
            guard.observe(logp_fn, rollouts)
        finally:
            model.train()

    # -- micro-batches ------------------------------------------------------------------------------------------------

    def _compute_loss(self, original: Callable[..., Any], model: torch.nn.Module, inputs: dict[str, Any], *args: Any,
                      **kwargs: Any) -> Any:
        if not (self.monitor.due and REWARD in inputs):  # an evaluation's have none
            return original(model, inputs, *args, **kwargs)
        self._seen = seen = _Seen()
        try:
            loss = original(model, inputs, *args, **kwargs)
        finally:
            self._seen = None
        with self.monitor.timed(inputs[REWARD].device):
            self._feed(inputs, seen)
        return loss

    def _get_logps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        result = original(*args, **kwargs)
        if self._seen is not None:
            self._seen.logp = result[0].detach()
            self._seen.entropy = None if result[1] is None else result[1].detach()
        return result

    def _see_hidden(self, hidden: torch.Tensor) -> None:
        if self._seen is not None and torch.is_grad_enabled():
            self._seen.hidden.append(hidden)

    def _ask_for_sum_p_sq(self) -> None:
        """Have the fused head compute log Σp² as well; releases before 1.16 have none."""
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError:
            return
        trainer, model = self.trainer, self.trainer.model
        add_fused_lm_head(base_model(model), trainer.temperature, trainer.args.cast_lm_head_to_fp32,
                          outputs=("log_probs", "entropy", "log_sum_sq_probs"))
        model.register_forward_hook(self._see_output)  # PEFT calls the base model's forward past its hooks

    def _see_output(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = getattr(output, "log_sum_sq_probs", None)
        if self._seen is not None and found is not None:
            self._seen.log_sum_p_sq.append(found.detach())

    def _feed(self, inputs: dict[str, Any], seen: _Seen) -> None:
        mask, advantages = _loss_mask(inputs), inputs["advantages"]
        data = {"rewards": inputs[REWARD], "prompt_ids": inputs[PROMPT], "success_rate": inputs[SUCCESS_RATE],
                "advantages": advantages if advantages.ndim == 1 else None, "mask": mask, "logp": seen.logp,
                "entropy": seen.entropy, "old_logp": inputs.get("old_per_token_logps")}
        if seen.logp is None:
            data["old_logp"] = None
        elif seen.log_sum_p_sq:
            data["sum_p_sq"] = torch.cat(seen.log_sum_p_sq)[:, -mask.shape[1]:].exp()
        if seen.hidden and self._hidden is not None:
            try:
                data |= self._measure(self._hidden, inputs, mask, torch.cat(seen.hidden), seen.logp is not None)
            except NotMeasurable as reason:
                self._give_up(reason)
        self.monitor.update(**data)

    def _measure(self, states: HiddenStates, inputs: dict[str, Any], mask: torch.Tensor, hidden: torch.Tensor,
                 with_stats: bool) -> dict[str, Any]:
        """The gap of the scored completions, and Σp² if that is all of them."""
        ids, rewards = inputs["completion_ids"], inputs[REWARD]
        if hidden.shape[:2] != (ids.shape[0], inputs["prompt_ids"].shape[1] + ids.shape[1]):
            raise NotMeasurable("the backbone does not see whole sequences (sequence parallelism)")
        hidden = hidden[:, -ids.shape[1] - 1:-1]  # the positions that predict completion tokens
        scored = ~rewards.isnan()
        whole = bool(scored.all())
        if not whole:
            ids, mask, hidden, rewards = ids[scored], mask[scored], hidden[scored], rewards[scored]
        rollouts = Rollouts.from_padded(ids, mask, rewards, prompt_ids=inputs[PROMPT][scored],
                                        threshold=self.monitor.threshold)
        hidden, weight, options = states.head(hidden)
        gap = gradient_gap(hidden, weight, rollouts, level=self.monitor.level, length_norm=self.monitor.length_norm,
                           **options)
        found: dict[str, Any] = {"gap": gap}
        if whole and with_stats and gap.stats is not None:
            found["sum_p_sq"] = rollouts.unpack(gap.stats.sum_p_sq, 1.0)
        return found

    def _give_up(self, reason: NotMeasurable) -> None:
        warnings.warn(f"the gradient gap is not measured: {reason}", stacklevel=2)
        self._hidden = None

    # -- windows ------------------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log(self.monitor.compute())
        self.monitor.reset()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the step, so that what the guard did to it is logged with it."""
        if self.guard is not None:
            self._log({key: value for key, value in self.guard.metrics().items() if math.isfinite(value)})

    def _log(self, found: dict[str, float]) -> None:
        for key, value in found.items():
            self.trainer._metrics["train"][key].append(value)


def _loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """[B, T] bool: completion tokens that the policy chose, tools' output left out."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``wrapper(original, *args, **kwargs)`` called in place of one object's method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)
