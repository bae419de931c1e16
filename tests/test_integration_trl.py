"""``instrument(trainer)`` on a real GRPOTrainer: a tiny random Qwen2 with a tokenizer made here, on the CPU."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install trl")
pytest.importorskip("datasets")

import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import rlvr_fast as rf
from rlvr_fast.integrations.trl import PROMPT, REWARD, SUCCESS_RATE, _loss_mask, instrument
from rlvr_fast.step.guard import StepGuard, StepWarning

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GENERATIONS = 4
UNLIMITED = {"budget": None, "decay": None}
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
FLOAT32 = 1e-5  # forwards of other batch shapes


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *LETTERS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def model(**config) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(LETTERS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, **config))


def first_half(completions: list[str], **kwargs) -> list[float]:
    """1 if the first letter is of the first half of the alphabet."""
    return [float(text[:1] in LETTERS[:13] and text != "") for text in completions]


def sometimes(completions: list[str], **kwargs) -> list[float | None]:
    """No reward for a vowel."""
    return [None if text[:1] in "aeiou" else value
            for text, value in zip(completions, first_half(completions), strict=True)]


def train(folder: Path, *, own_model=None, reward=first_half, optimizer=None, instrumented: dict | None = None,
          **config) -> GRPOTrainer:
    """Two optimizer steps on four prompts of four completions; ``instrumented``: with what, None for not at all."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": GENERATIONS,
               "max_completion_length": 6, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
               "seed": 0, "output_dir": str(folder)} | QUIET | config
    torch.manual_seed(0)
    trainer = GRPOTrainer(own_model or model(), reward, args=GRPOConfig(**options), processing_class=tokenizer(),
                          optimizers=(optimizer, None),
                          train_dataset=Dataset.from_dict({"prompt": ["ab", "cd", "efg", "h", "ij", "k"] * 4}))
    if instrumented is not None:
        instrument(trainer, **instrumented)
    trainer.train()
    return trainer


def logged(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """The metrics of each step, without those of time."""
    return [{key: value for key, value in entry.items() if key.startswith("rlvr/") and "/time/" not in key}
            for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> GRPOTrainer:
    return train(tmp_path_factory.mktemp("whole"), instrumented=UNLIMITED)


def test_metrics_of_every_tier_reach_the_log_history(whole):
    steps = logged(whole)
    assert len(steps) == 2
    for found in steps:
        assert {"rlvr/group/p_mean", "rlvr/group/frac_mixed", "rlvr/gap/kappa", "rlvr/length/bias_index",
                "rlvr/logp/gap", "rlvr/token/score_sq", "rlvr/sharpening/alignment", "rlvr/gap/norm",
                "rlvr/gap/norm_sq", "rlvr/gap/norm_sq_stderr", "rlvr/signal_to_noise"} <= found.keys()
        assert all(math.isfinite(value) for value in found.values())
    entry = next(entry for entry in whole.state.log_history if "loss" in entry)
    assert entry["rlvr/time/overhead_ms"] > 0
    # what TRL says of the same step itself
    assert steps[0]["rlvr/group/p_mean"] == pytest.approx(entry["reward"], rel=FLOAT32)
    assert 1 - steps[0]["rlvr/group/frac_mixed"] == pytest.approx(entry["frac_reward_zero_std"], rel=FLOAT32)
    assert steps[0]["rlvr/token/entropy"] == pytest.approx(entry["entropy"], rel=1e-3)


@pytest.mark.parametrize("reward", [first_half, sometimes])
def test_the_gap_is_that_of_the_same_completions_measured_apart(tmp_path, reward):
    """Hidden states, head, temperature, mask and rewards as the trainer had them in its first step."""
    caught = {}

    def remember(trainer):
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

    trainer = train_with(tmp_path, remember, temperature=0.7, reward=reward)
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


def train_with(folder: Path, prepare, **config) -> GRPOTrainer:
    """``train`` with something done to the trainer after it was instrumented."""
    original = GRPOTrainer.train

    def patched(self, *args, **kwargs):
        prepare(self)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "train", patched)
        return train(folder, instrumented=UNLIMITED, **config)


@pytest.mark.parametrize("config", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
                                    {"gradient_checkpointing": True}],
                         ids=["plain", "accumulated", "checkpointed"])
def test_training_is_bitwise_the_same(tmp_path, config):
    with_it, without = (train(tmp_path, instrumented=options, **config) for options in (UNLIMITED, None))
    assert len(logged(with_it)[0]) > 20
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
              for trainer in (with_it, without)]
    assert losses[0] == losses[1]
    for own, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_micro_batches_give_the_metrics_of_one_batch(tmp_path, whole):
    """The first step, whose completions are the same: TRL shuffles groups over its four micro-batches."""
    split = train(tmp_path, instrumented=UNLIMITED, gradient_accumulation_steps=4, per_device_train_batch_size=4)
    assert logged(split)[0] == pytest.approx(logged(whole)[0], rel=FLOAT32, abs=FLOAT32)


def test_fragments_know_the_success_rate_of_their_group(tmp_path):
    """Two optimizer steps per generation: each sees fragments of groups, and old log-probs of the first policy."""
    batches = []

    def remember(trainer):
        original = trainer.compute_loss

        def compute_loss(own_model, inputs, *args, **kwargs):
            batches.append({name: inputs[name].clone() for name in (REWARD, PROMPT, SUCCESS_RATE)})
            return original(own_model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    trainer = train_with(tmp_path, remember, steps_per_generation=2, per_device_train_batch_size=8, max_steps=4)
    both = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert both[PROMPT].unique().tolist() == list(range(8))  # 4 prompts of 2 generations
    for prompt in range(8):
        own = both[PROMPT] == prompt
        assert own.sum() == GENERATIONS
        assert (both[SUCCESS_RATE][own] == both[REWARD][own].mean()).all()
    assert any(len(batch[PROMPT].unique()) * GENERATIONS > len(batch[PROMPT]) for batch in batches)  # fragments
    own = logged(trainer)
    for first, second in ((0, 1), (2, 3)):
        assert own[first]["rlvr/ratio/kl"] == pytest.approx(0, abs=1e-6)
        assert own[second]["rlvr/ratio/kl"] > 1e-6


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


def test_every_other_step_and_no_evaluation(tmp_path):
    trainer = train(tmp_path, instrumented=UNLIMITED | {"every": 2}, max_steps=4)
    assert [len(step) > 0 for step in logged(trainer)] == [True, False, True, False]
    before = repr(trainer.gap_monitor)
    assert "(measured)" in before  # so that an evaluation would be, too
    trainer.evaluate(Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"]}))
    assert repr(trainer.gap_monitor) == before


def test_groups_that_straddle_two_processes(tmp_path):
    """Three prompts of four completions on two processes of six: TRL's own figures are over both, and so are these."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                                "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["metrics"] == second["metrics"]
    for found, entry in zip(first["metrics"], first["log"], strict=True):
        assert found["rlvr/group/p_mean"] == pytest.approx(entry["reward"], rel=FLOAT32)
        assert found["rlvr/group/frac_mixed"] == pytest.approx(1 - entry["frac_reward_zero_std"], rel=FLOAT32)
        assert "rlvr/gap/energy_pos" in found


def one_of_two_processes(folder: Path) -> None:
    trainer = train(folder, instrumented=UNLIMITED, per_device_train_batch_size=6, max_steps=1)
    rank = trainer.accelerator.process_index
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"metrics": logged(trainer), "log": log}, folder / f"{rank}.pt")


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


def test_a_guard_observes_fresh_completions_and_leaves_training_as_it_is(tmp_path):
    def run(guarded: bool) -> GRPOTrainer:
        own = model()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
        guard = StepGuard(optimizer, mode="warn", share=None) if guarded else None
        return train(tmp_path, own_model=own, optimizer=guard or optimizer, max_steps=3,
                     instrumented=UNLIMITED | {"guard": guard} if guarded else None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StepWarning)
        guarded, plain = run(True), run(False)
    for own, other in zip(guarded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(own, other)
    found = logged(guarded)
    assert [step["rlvr/step/guard/measured"] for step in found] == [0.0, 1.0, 2.0]
    assert any(key.startswith("rlvr/step/meter/") for key in found[1])


def test_a_guard_that_is_not_the_optimizer_is_refused(tmp_path):
    own = model()
    guard = StepGuard(torch.optim.SGD(own.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="guard must be the StepGuard that is the trainer's optimizer"):
        train(tmp_path, own_model=own, instrumented={"guard": guard})


def test_the_example_runs(tmp_path):
    path = Path(__file__).parents[1] / "examples" / "trl_grpo.py"
    spec = importlib.util.spec_from_file_location("trl_grpo", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainer = example.main(model(), tokenizer(), per_device_train_batch_size=8, max_steps=1, **QUIET,
                           output_dir=str(tmp_path))
    assert "rlvr/group/p_mean" in logged(trainer)[0]
    assert example.is_right([" 12\n3", "13"], ["12", "12"]) == [1.0, 0.0]


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]))
