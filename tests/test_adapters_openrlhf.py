"""Experiences of OpenRLHF give a monitor what the same tensors give it directly, and carry its metrics to the actors.

With OpenRLHF installed (0.11.2, ``pip install --no-deps openrlhf pylatexenc``) the Experience and the functions that
split and join it are its own; elsewhere a stand-in with the same fields takes their place.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_packs import ordered_step
from monitor_ranks import GROUP_SIZE, Step, monitor, without_time

from rlvr_fast.integrations import openrlhf as integration

try:
    from openrlhf.trainer.ppo_utils import experience as real
except ImportError:
    real = None
needs_openrlhf = pytest.mark.skipif(real is None, reason="needs OpenRLHF: pip install --no-deps openrlhf pylatexenc")


@dataclasses.dataclass
class StandIn:
    """The fields of OpenRLHF 0.11.2's Experience that the adapter reads, and the mask that names the sequences."""

    sequences: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    action_mask: torch.Tensor | None = None
    action_log_probs: torch.Tensor | None = None
    base_action_log_probs: torch.Tensor | None = None
    rollout_log_probs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    response_length: torch.Tensor | None = None
    truncated: torch.Tensor | None = None
    total_length: torch.Tensor | None = None
    index: list[int] | None = None
    prompts: list[str] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    images: list[Any] = dataclasses.field(default_factory=list)
    mm_train_inputs: list[Any] = dataclasses.field(default_factory=list)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


Experience = StandIn if real is None else real.Experience


@needs_openrlhf
def test_the_stand_in_has_the_fields_of_the_real_experience():
    own, theirs = ([field.name for field in dataclasses.fields(kind)] for kind in (StandIn, real.Experience))
    assert own == theirs


@pytest.fixture
def step() -> Step:
    return ordered_step()


def experience(step: Step, rows: list[int], **fields) -> Any:
    """These responses as one Experience of the driver."""
    own = step.rows(rows)
    rewards = own.correct.float()
    return Experience(**{
        "sequences": own.ids, "attention_mask": torch.ones_like(own.ids), "action_mask": own.mask,
        "action_log_probs": own.logp.float(), "rollout_log_probs": own.old_logp.float(),
        "advantages": own.advantages.float()[:, None].expand(own.mask.shape).clone(), "rewards": rewards,
        "total_length": own.mask.sum(1), "index": list(rows), "info": {"reward": rewards.clone()}} | fields)


def expected(step: Step, **options) -> dict[str, float]:
    own = monitor(estimator="dr_grpo", **options)
    own.update(correct=step.correct, prompt_ids=step.prompt_ids, mask=step.mask, logp=step.logp.float(),
               old_logp=step.old_logp.float(), advantages=step.advantages)
    return without_time(own.compute())


def parts(step: Step) -> list[list[int]]:
    """Micro-batches that tear groups apart."""
    every = list(range(len(step.prompt_ids)))
    return [every[1::2], every[::2]]


def test_a_steps_experiences_give_what_their_tensors_give_a_monitor(step):
    experiences = [experience(step, index) for index in parts(step)]
    found = integration.gap_metrics(monitor(estimator="dr_grpo"), experiences, group_size=GROUP_SIZE)
    assert without_time(found) == pytest.approx(expected(step), rel=1e-6, abs=1e-9)
    assert {"rlvr/group/frac_solved", "rlvr/ratio/ess", "rlvr/logp/gap", "rlvr/gap/kappa"} <= found.keys()
    assert not any("min" in key or "max" in key for key in found)


def test_advantages_of_another_baseline_are_not_looked_at(step):
    found = integration.gap_metrics(monitor(), [experience(step, list(range(len(step.ids))))], group_size=GROUP_SIZE,
                                    with_advantages=False)
    assert "rlvr/gap/kappa" not in found
    assert "rlvr/group/frac_mixed" in found


def test_info_carries_them_to_the_actors_one_entry_per_response(step):
    experiences = [experience(step, index) for index in parts(step)]
    found = integration.gap_metrics(monitor(), experiences, group_size=GROUP_SIZE)
    for one in experiences:
        for key, value in found.items():
            assert torch.equal(one.info[key], torch.full((len(one.sequences),), value))
        assert torch.equal(one.info["reward"], one.rewards)


def test_the_training_tensors_are_as_they_were(step):
    one, other = (experience(step, parts(step)[0]) for _ in range(2))
    integration.gap_metrics(monitor(), [one], group_size=GROUP_SIZE)
    for field in dataclasses.fields(Experience):
        if isinstance(value := getattr(one, field.name), torch.Tensor):
            assert torch.equal(value, getattr(other, field.name))


def test_the_window_ends_with_the_step(step):
    own = monitor()
    for _ in range(2):
        found = integration.gap_metrics(own, [experience(step, list(range(len(step.ids))))], group_size=GROUP_SIZE)
    assert found["rlvr/length/mean"] == pytest.approx(float(step.mask.sum(1).double().mean()))
    assert "responses=0" in repr(own)


def test_in_a_window_that_is_not_measured_nothing_is_read_and_nothing_logged(step):
    own = monitor(every=2)
    for measured in (True, False, True):
        one = experience(step, list(range(len(step.ids))))
        assert bool(integration.gap_metrics(own, [one], group_size=GROUP_SIZE)) == measured
        assert ("rlvr/group/p_mean" in one.info) == measured
    integration.update(own, None)


def test_in_an_actor_groups_are_recovered_from_advantages(step):
    """The replay buffer has taken the index away."""
    own = monitor(estimator="dr_grpo", group_size=GROUP_SIZE)
    for index in parts(step):
        integration.update(own, experience(step, index, index=None))
    found, known = without_time(own.compute()), expected(step)
    for key in ("rlvr/group/frac_mixed", "rlvr/group/p_mean", "rlvr/logp/gap", "rlvr/gap/kappa"):
        assert found[key] == pytest.approx(known[key], rel=1e-5)


def test_scores_are_the_verdict_then_the_raw_reward_then_the_shaped_one(step):
    every = list(range(len(step.prompt_ids)))
    right = step.correct.float()

    def success(**fields) -> float:
        own = monitor()
        integration.update(own, experience(step, every, advantages=None, **fields), group_size=GROUP_SIZE)
        return own.compute()["rlvr/group/p_mean"]

    rate = pytest.approx(float(right.mean()))
    shaped = 2 * right - 1.3
    assert success(scores=right, info={"reward": shaped}, rewards=shaped) == rate
    assert success(info={"reward": right}, rewards=shaped) == rate
    assert success(info={}, rewards=right) == rate
    with pytest.raises(ValueError, match="rewards must be 0 or 1"):
        success(info={}, rewards=shaped)


def test_hostile_batches(step):
    every = list(range(len(step.prompt_ids)))
    rewards = step.correct.float()
    rewards[0] = torch.nan
    poisoned = torch.full(step.mask.shape, torch.nan)
    own = monitor()
    found = integration.gap_metrics(own, [experience(step, every, rewards=rewards, info={"reward": rewards},
                                                     advantages=poisoned)], group_size=GROUP_SIZE)
    assert found["rlvr/group/frac_unscored"] == pytest.approx(1 / len(every))
    assert "rlvr/gap/kappa" not in found
    masked = experience(step, every, action_mask=torch.zeros_like(step.mask))
    found = integration.gap_metrics(own, [masked], group_size=GROUP_SIZE)
    assert found["rlvr/length/mean"] == 0
    assert found["rlvr/group/p_mean"] == pytest.approx(float(step.correct.double().mean()))
    found = integration.gap_metrics(own, [experience(step, every)], group_size=1)
    assert found["rlvr/group/frac_mixed"] == 0


def test_what_is_no_experience_is_refused_by_name(step):
    with pytest.raises(TypeError, match=r"Experience as in OpenRLHF 0.11.2, got dict without action_mask, "
                                        "action_log_probs, rollout_log_probs, advantages, rewards, scores, index, "
                                        "info"):
        integration.update(monitor(), {})
    with pytest.raises(ValueError, match=r"group_size needs experience.index"):
        integration.update(monitor(), experience(step, [0, 1], index=None), group_size=2)
    with pytest.raises(ValueError, match="group_size must be an int >= 1 or None, got 0"):
        integration.update(monitor(), experience(step, [0, 1]), group_size=0)
    with pytest.raises(TypeError, match=r"rewards must be a torch.Tensor, got list"):
        integration.update(monitor(), experience(step, [0, 1], info={"reward": [0.0, 1.0]}), group_size=2)
    with pytest.raises(TypeError, match=r"experience.action_mask must be a torch.Tensor"):
        integration.update(monitor(), experience(step, [0, 1], action_mask=None), group_size=2)


@needs_openrlhf
def test_metrics_survive_the_replay_buffer(step):
    """Split into samples, unpadded and joined again as the actor's loader does: the mean that it logs is the value."""
    whole = experience(step, list(range(len(step.prompt_ids))))
    found = integration.gap_metrics(monitor(), [whole], group_size=GROUP_SIZE)
    samples = real.remove_padding_in_sequences(real.split_experience_batch(whole))
    batch = real.make_experience_batch(samples[3:9])
    for key, value in found.items():
        assert torch.tensor(batch.info[key], dtype=torch.float).mean() == pytest.approx(value, rel=1e-6, abs=1e-7)


def test_advantages_of_openrlhf_itself(step):
    """Its own driver code makes advantages, the adapter reads them."""
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker", reason="needs all that OpenRLHF needs",
                                exc_type=ImportError).RemoteExperienceMaker
    experiences = [experience(step, index, advantages=None, kl=torch.zeros(len(index), step.mask.shape[1]))
                   for index in parts(step)]
    off = SimpleNamespace(overlong_buffer_len=None, stop_properly_penalty_coef=None, clip_range=None)
    arguments = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=GROUP_SIZE), reward=off,
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="dr_grpo", gamma=1.0)))
    own = SimpleNamespace(strategy=SimpleNamespace(args=arguments), advantage_estimator="dr_grpo",
                          kl_ctl=SimpleNamespace(value=0.0), get_cumulative_returns=lambda *args: (
                              maker.get_cumulative_returns(None, *args)))
    maker.compute_advantages_and_returns(own, experiences)
    found = integration.gap_metrics(monitor(estimator="dr_grpo"), experiences, group_size=GROUP_SIZE)
    assert without_time(found) == pytest.approx(expected(step), rel=1e-5, abs=1e-7)
    assert "rlvr/gap/kappa" in found
