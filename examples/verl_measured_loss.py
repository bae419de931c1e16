"""What verl logs of a measured policy loss, and what the measuring costs: no GPU, no Ray, no model.

Needs verl. Responses whose policy has moved a little go through its losses, and its own functions average.
"""

from __future__ import annotations

import statistics
import time

import torch
from verl.trainer.ppo import core_algos
from verl.utils.metric import Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict, rename_dict
from verl.workers.config import FSDPActorConfig

RESPONSES, TOKENS, MICRO_BATCH, ROUNDS = 32, 1024, 8, 20


def batch() -> dict[str, torch.Tensor]:
    """[RESPONSES, TOKENS] each: groups of 8 whose success rates differ, incorrect responses longer."""
    torch.manual_seed(0)
    correct = torch.rand(RESPONSES) < torch.linspace(0, 1, RESPONSES // 8).repeat_interleave(8)
    lengths = torch.where(correct, torch.randint(100, 500, (RESPONSES,)), torch.randint(200, TOKENS, (RESPONSES,)))
    mask = torch.arange(TOKENS) < lengths[:, None]
    advantages = (correct.float().view(-1, 8) - correct.float().view(-1, 8).mean(1, keepdim=True)).view(-1, 1) * mask
    old = -2 * torch.rand(RESPONSES, TOKENS)
    return {"old_log_prob": old, "log_prob": (old + 0.1 * torch.randn_like(old)).clamp(max=0),
            "advantages": advantages, "response_mask": mask}


def step(loss_mode: str, whole: dict[str, torch.Tensor], config: FSDPActorConfig) -> tuple[dict[str, float], float]:
    """(what the driver logs, seconds of the policy loss, backward and averaging) of one mini-batch."""
    loss, metrics = core_algos.get_policy_loss_fn(loss_mode), {}
    start = time.perf_counter()
    for first in range(0, RESPONSES, MICRO_BATCH):
        part = {name: value[first:first + MICRO_BATCH] for name, value in whole.items()}
        part["log_prob"] = part["log_prob"].clone().requires_grad_()
        value, found = loss(**part, loss_agg_mode="token-mean", config=config)
        value.backward()
        append_to_dict(metrics, Metric.from_dict(found, "mean"))
    return reduce_metrics(rename_dict(metrics, "actor/")), time.perf_counter() - start


def main() -> dict[str, float]:
    whole = batch()
    config = FSDPActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=MICRO_BATCH,
                             global_batch_info={"batch_num_tokens": int(whole["response_mask"].sum()), "dp_size": 1})
    runs = {mode: [step(mode, whole, config) for _ in range(ROUNDS)] for mode in ("vanilla", "rlvr:vanilla")}
    logged = runs["rlvr:vanilla"][0][0]
    print("\n".join(f"{key:32} {value:9.4f}" for key, value in logged.items()))
    for mode, found in runs.items():
        per_micro_batch = statistics.median(seconds for _, seconds in found) / (RESPONSES // MICRO_BATCH)
        print(f"{mode:32} {1e3 * per_micro_batch:9.2f} ms per micro-batch, backward of the loss included")
    return logged


if __name__ == "__main__":
    main()
