"""``instrument(trainer)`` on a real GRPOTrainer: a tiny random Qwen2 with a tokenizer made here, on the CPU."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

pytest.importorskip("trl.trainer", reason="needs TRL: pip install trl")
pytest.importorskip("datasets")

import trl.trainer.utils
from trl_training import FLOAT32, QUIET, UNLIMITED, entries, first_half, logged, model, sometimes, train, trainer_of

import rlvr_fast as rf
from rlvr_fast.integrations.trl import PROMPT, REWARD, SUCCESS_RATE, _loss_mask, instrument


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), instrumented=UNLIMITED)


def test_metrics_of_every_tier_reach_the_log_history(whole):
    steps = logged(whole)
    assert len(steps) == 2
    for found in steps:
        assert {"rlvr/group/p_mean", "rlvr/group/frac_mixed", "rlvr/gap/kappa", "rlvr/length/bias_index",
                "rlvr/logp/gap", "rlvr/token/score_sq", "rlvr/sharpening/alignment", "rlvr/gap/norm",
                "rlvr/gap/norm_sq", "rlvr/gap/norm_sq_stderr", "rlvr/signal_to_noise"} <= found.keys()
        assert all(math.isfinite(value) for value in found.values())
    entry = entries(whole)[0]
    assert entry["rlvr/time/overhead_ms"] > 0
    # what TRL says of the same step itself
    assert steps[0]["rlvr/group/p_mean"] == pytest.approx(entry["reward"], rel=FLOAT32)
    assert 1 - steps[0]["rlvr/group/frac_mixed"] == pytest.approx(entry["frac_reward_zero_std"], rel=FLOAT32)
    assert steps[0]["rlvr/token/entropy"] == pytest.approx(entry["entropy"], rel=1e-3)


def test_metrics_reach_tensorboard(tmp_path):
    """TRL hands its own metrics to every logger before callbacks are asked; ours go with them."""
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, instrumented=UNLIMITED, **QUIET | {"report_to": "tensorboard"})
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0]))
    events.Reload()
    for key in logged(trainer)[0]:
        found = [event.value for event in events.Scalars(f"train/{key}")]
        expected = [step[key] for step in logged(trainer) if key in step]
        assert found == pytest.approx(expected, rel=1e-6), key  # TensorBoard keeps float32


@pytest.mark.parametrize("reward", [first_half, sometimes])
def test_the_gap_is_that_of_the_same_completions_measured_apart(tmp_path, reward):
    """Hidden states, head, temperature, mask and rewards as the trainer had them in its first step."""
    caught = {}
    trainer = trainer_of(tmp_path, temperature=0.7, reward=reward, instrumented=UNLIMITED)
    original = trainer.compute_loss

    def compute_loss(own_model, inputs, *args, **kwargs):
        if not caught:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                hidden = own_model.model(input_ids=ids, attention_mask=attention).last_hidden_state
            caught.update({name: value.clone() for name, value in inputs.items() if value.ndim},
                          hidden=hidden, weight=own_model.lm_head.weight.detach().clone())
        return original(own_model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    width, scored = caught["completion_ids"].shape[1], ~caught[REWARD].isnan()
    assert bool(scored.all()) == (reward is first_half)
    rollouts = rf.Rollouts.from_padded(caught["completion_ids"][scored], caught["completion_mask"][scored],
                                       caught[REWARD][scored], prompt_ids=caught[PROMPT][scored])
    gap = rf.gradient_gap(caught["hidden"][scored, -width - 1:-1], caught["weight"], rollouts, length_norm=False,
                          temperature=0.7)
    summary = gap.summary()
    found = logged(trainer)[0]
    for key in ("rlvr/gap/norm_sq", "rlvr/gap/norm_sq_stderr", "rlvr/gap/energy_pos", "rlvr/gap/batch_norm_sq"):
        assert found[key] == pytest.approx(summary[key], rel=1e-4), key
    if reward is first_half:  # Σp² comes with the gap, where that is of all completions
        assert found["rlvr/token/score_sq"] == pytest.approx(_mean_score_sq(caught, width), rel=1e-4)


def _mean_score_sq(caught: dict[str, torch.Tensor], width: int) -> float:
    p = (caught["hidden"][:, -width - 1:-1].double() @ caught["weight"].double().T / 0.7).softmax(-1)
    score = torch.nn.functional.one_hot(caught["completion_ids"], p.shape[-1]) - p
    return float(score.square().sum(-1)[caught["completion_mask"].bool()].mean())


@pytest.mark.parametrize("config", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
                                    {"gradient_checkpointing": True}],
                         ids=["plain", "accumulated", "checkpointed"])
def test_training_is_bitwise_the_same(tmp_path, config):
    with_it, without = (train(tmp_path, instrumented=options, **config) for options in (UNLIMITED, None))
    assert len(logged(with_it)[0]) > 20
    losses = [[entry["loss"] for entry in entries(trainer)] for trainer in (with_it, without)]
    assert losses[0] == losses[1]
    for own, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_losses_length_normalisation_is_the_gaps(tmp_path):
    trainer = train(tmp_path, instrumented=UNLIMITED, loss_type="grpo", max_steps=1)
    assert trainer.gap_monitor.length_norm
    assert not train(tmp_path, instrumented=UNLIMITED, loss_type="dapo", max_steps=1).gap_monitor.length_norm


@pytest.mark.parametrize("config", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}])
def test_without_a_level_what_the_fused_head_tells_remains(tmp_path, whole, config):
    """Log-probs, entropies and, where TRL's head has it, Σp²; training is bitwise the same here, too."""
    trainer = train(tmp_path, instrumented={"level": None} | UNLIMITED, **config)
    found, expected = logged(trainer)[0], logged(whole)[0]
    assert not any(key.startswith("rlvr/gap/norm") for key in found)
    wanted = {"rlvr/logp/gap", "rlvr/sharpening/alignment"}
    if hasattr(trl.trainer.utils, "add_fused_lm_head"):
        wanted |= {"rlvr/token/score_sq", "rlvr/token/energy_pos"}
    assert wanted <= found.keys() & expected.keys()
    for key in found.keys() & expected.keys():
        assert found[key] == pytest.approx(expected[key], rel=FLOAT32, abs=FLOAT32)
    plain = train(tmp_path, **config)
    for own, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_unscored_completions_are_left_out_of_the_gap(tmp_path):
    found = logged(train(tmp_path, reward=sometimes, instrumented=UNLIMITED, max_steps=2))
    assert all(step["rlvr/group/frac_unscored"] > 0 for step in found)
    assert all("rlvr/gap/norm" in step for step in found)


def test_other_rewards_need_a_threshold(tmp_path):
    def graded(completions, **kwargs):
        return [0.25 + value / 2 for value in first_half(completions)]

    with pytest.raises(ValueError, match="rewards must be 0 or 1"):
        train(tmp_path, reward=graded, instrumented=UNLIMITED)
    found = logged(train(tmp_path, reward=graded, instrumented=UNLIMITED | {"threshold": 0.5}, max_steps=1))[0]
    assert 0 < found["rlvr/group/p_mean"] < 1


@pytest.mark.parametrize("level", ["hidden", None])
def test_a_peft_adapter(tmp_path, level):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = logged(train(tmp_path, own_model=adapted, instrumented=UNLIMITED | {"level": level}))
    wanted = {"rlvr/gap/norm"} if level else set()
    if level or hasattr(trl.trainer.utils, "add_fused_lm_head"):
        wanted.add("rlvr/token/score_sq")
    assert all(wanted <= step.keys() for step in found)


def test_a_head_that_cannot_be_measured_is_said_and_the_rest_is_logged(tmp_path):
    odd = model()
    odd.config.logit_scale, odd.config.final_logit_softcapping = 2.0, 30.0
    with pytest.warns(UserWarning, match="the gradient gap is not measured: logits are scaled before a softcap"):
        found = logged(train(tmp_path, own_model=odd, instrumented=UNLIMITED, max_steps=1))[0]
    assert "rlvr/gap/norm" not in found
    assert "rlvr/sharpening/alignment" in found


def test_tools_output_is_no_part_of_a_completion():
    batch = {"completion_mask": torch.tensor([[1, 1, 1, 0]]), "tool_mask": torch.tensor([[1, 0, 1, 1]])}
    assert _loss_mask(batch).tolist() == [[True, False, True, False]]


def test_refusals(whole):
    with pytest.raises(ValueError, match="trainer must not be instrumented twice"):
        instrument(whole)
    with pytest.raises(TypeError, match=r"trainer must be a GRPOTrainer of TRL 1\.0 or later, got object without"):
        instrument(object())
    assert {REWARD, PROMPT, SUCCESS_RATE} == {"rlvr_reward", "rlvr_prompt", "rlvr_success_rate"}
