"""Micro-batches as verl's engines hand them to a policy loss, with verl's own configuration objects.

Needs no pytest: spawned processes import it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from rlvr_fast.integrations.verl_update import KEY, SUMS

VOCABULARY, PROMPT, RESPONSE = 32, 3, 6
SUM_KEYS = {KEY + name for name in SUMS}


def actor(loss_mode: str, *, correction: dict | None = None, **options) -> FSDPActorConfig:
    """What ``actor_rollout_ref.actor.policy_loss.loss_mode=...`` makes."""
    policy_loss = PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.5, clip_cov_ratio=0.2, kl_cov_ratio=0.2,
                                   rollout_correction=RolloutCorrectionConfig(**(correction or {})))
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=policy_loss,
                             **options)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    return config


@dataclass(frozen=True)
class LossInputs:
    """[B, T] each; advantages are the same on every token of a response, 0 in some responses, and 0 on padding."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor

    @classmethod
    def sample(cls, seed: int = 0, responses: int = 8, moved: float = 0.4) -> LossInputs:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, RESPONSE + 1, (responses,), generator=generator)
        mask = torch.arange(RESPONSE) < lengths[:, None]
        log_prob = -torch.rand(responses, RESPONSE, generator=generator) * 3 - 0.01
        old = log_prob + moved * torch.randn(responses, RESPONSE, generator=generator)
        advantages = torch.randn(responses, 1, generator=generator)
        advantages[::4] = 0.0
        return cls(old.clamp(max=-1e-3), log_prob, advantages * mask, mask)

    def __getitem__(self, rows: slice) -> LossInputs:
        return LossInputs(*(value[rows] for value in vars(self).values()))

    def arguments(self, config: FSDPActorConfig, weights: torch.Tensor | None = None) -> dict:
        """As ``ppo_loss`` passes them; the log-probs are a new leaf."""
        return {"old_log_prob": self.old_log_prob, "log_prob": self.log_prob.clone().requires_grad_(),
                "advantages": self.advantages, "response_mask": self.response_mask,
                "loss_agg_mode": config.loss_agg_mode, "config": config, "rollout_is_weights": weights}

    def jagged(self, *, dp_size: int = 1, tokens: int | None = None, responses: int | None = None, seed: int = 0
               ) -> tuple[dict[str, torch.Tensor], TensorDict]:
        """(model output, data) of ``ppo_loss``: log-probs and entropies of prompt and response tokens, without padding.

        Args:
            tokens, responses: of the whole mini-batch, where this is a part of one.
        """
        data = self.padded(seed)
        data["ref_log_prob"] = self.old_log_prob - 0.1
        data = left_right_2_no_padding(data)
        lengths = self.response_mask.sum(1)
        tensordict_utils.assign_non_tensor(
            data, dp_size=dp_size, batch_num_tokens=int(self.response_mask.sum()) if tokens is None else tokens,
            global_batch_size=len(lengths) if responses is None else responses)
        offsets = data["input_ids"].offsets()
        values = torch.full((int(offsets[-1]),), -1.0)
        ends = offsets[1:]
        for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
            values[end - length - 1:end - 1] = self.log_prob[row, :length]  # a token's log-prob is at the one before
        leaf = values.requires_grad_()
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets),
                  "entropy": torch.nested.nested_tensor_from_jagged(-leaf, offsets)}
        return output | {"leaf": leaf}, data

    def padded(self, seed: int = 0) -> TensorDict:
        """The driver's batch: prompts on the left, responses on the right."""
        n = len(self.response_mask)
        ids = torch.randint(1, VOCABULARY, (n, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(seed))
        attention = torch.cat([torch.ones(n, PROMPT, dtype=torch.long), self.response_mask.long()], 1)
        return TensorDict({
            "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "input_ids": ids, "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0), "response_mask": self.response_mask.long(),
            "old_log_probs": self.old_log_prob, "advantages": self.advantages}, batch_size=n)


def run(name: str, inputs: LossInputs, config: FSDPActorConfig, weights: torch.Tensor | None = None):
    """(loss, metrics, gradient, state of the random numbers) of a registered loss; some draw random numbers."""
    torch.manual_seed(0)
    arguments = inputs.arguments(config, weights)
    loss, metrics = core_algos.get_policy_loss_fn(name)(**arguments)
    after = torch.get_rng_state()
    loss.backward()
    return loss.detach(), metrics, arguments["log_prob"].grad, after


def sums_of(name: str, inputs: LossInputs, **options) -> dict[str, float]:
    """What a registered loss reports of the update through verl's own ``ppo_loss``."""
    output, data = inputs.jagged(**options)
    _, metrics = ppo_loss(actor(name), output, data)
    return {key: metric.aggregate() for key, metric in metrics.items() if key in SUM_KEYS}
