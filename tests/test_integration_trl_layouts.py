"""One optimizer step of a real GRPOTrainer has one set of metrics, however micro-batches and processes split it.

Completions are the same in every layout: only sampling is replaced, by a function of the step and the completion's
number. Groups of four are split by TRL's own shuffle over its micro-batches, and the second one lies on both ranks.
"""

from __future__ import annotations

import pytest

pytest.importorskip("trl.trainer", reason="needs TRL: pip install trl")
pytest.importorskip("datasets")

import torch
from trl_training import GENERATIONS, LAYOUTS, Ranks, in_layout, logged, train, trainer_of

from rlvr_fast.integrations.trl import PROMPT, REWARD, SUCCESS_RATE

UNLIMITED = {"budget": None, "decay": None}
ABSOLUTE = 1e-5  # of what is a difference of sums: gradients of other batch shapes, added up in another order
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return in_layout(tmp_path_factory.mktemp("whole"), "one batch")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory.mktemp("ranks"))


def agree(found: dict, expected: dict) -> None:
    assert len(found["metrics"]) == len(expected["metrics"]) == 3
    for part in ("metrics", "theirs"):
        for step, wanted in zip(found[part], expected[part], strict=True):
            assert step == pytest.approx(wanted, rel=RELATIVE, abs=ABSOLUTE)


def test_one_batch_has_what_the_comparison_is_about(whole):
    """Mixed prompts, lengths, gaps and an update at every step, and other figures in the next one."""
    for step in whole["metrics"]:
        assert {"rlvr/gap/norm_sq", "rlvr/gap/batch_norm_sq", "rlvr/length/bias_index", "rlvr/token/score_sq",
                "rlvr/sharpening/alignment"} <= step.keys()
        assert step["rlvr/group/frac_mixed"] > 0
    assert any("rlvr/gap/cos_update" in step for step in whole["metrics"])  # not where noise is all there is
    assert whole["metrics"][0]["rlvr/gap/norm_sq"] != pytest.approx(whole["metrics"][1]["rlvr/gap/norm_sq"], rel=0.01)


def test_micro_batches_give_the_metrics_of_one_batch(tmp_path, whole):
    agree(in_layout(tmp_path, "micro-batches"), whole)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.startswith("two ranks")])
def test_two_ranks_give_the_metrics_of_one_process(ranks, whole, layout):
    first, second = ranks[layout]
    assert first["metrics"] == second["metrics"]
    agree(first, whole)


def test_a_guard_decides_alike_on_both_ranks(ranks):
    first, second = ranks["guard"]
    assert first["measured"] == second["measured"] == 3
    assert first["scales"] == second["scales"]
    assert first["scales"][0] == pytest.approx(0.2)
    assert len(set(first["scales"])) > 1  # it has decided something
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_a_guard_whose_ranks_would_decide_for_themselves_is_refused(ranks):
    for message in ranks["without reduction"]:
        assert message.startswith("guard must measure over all processes:")


def test_fragments_know_the_success_rate_of_their_group(tmp_path):
    """Two optimizer steps per generation: each sees fragments of groups, and old log-probs of the first policy."""
    batches = []
    trainer = trainer_of(tmp_path, instrumented=UNLIMITED, steps_per_generation=2, per_device_train_batch_size=8,
                         max_steps=4)
    original = trainer.compute_loss

    def compute_loss(own_model, inputs, *args, **kwargs):
        batches.append({name: inputs[name].clone() for name in (REWARD, PROMPT, SUCCESS_RATE)})
        return original(own_model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
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


@pytest.mark.parametrize(("config", "kept"), [
    ({}, [True, False, False, True]),  # a generation a step: those of other steps are left as TRL made them
    ({"num_iterations": 2}, [True, True, True, True])], ids=["one window", "two windows"])
def test_completions_are_labelled_where_a_window_may_need_them(tmp_path, config, kept):
    trainer = trainer_of(tmp_path, instrumented=UNLIMITED | {"every": 3}, max_steps=4, **config)
    found, original = [], trainer.compute_loss

    def compute_loss(own_model, inputs, *args, **kwargs):
        found.append(REWARD in inputs)
        return original(own_model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert found == kept
    assert [len(step) > 0 for step in logged(trainer)] == [True, False, False, True]


def test_every_other_step_and_no_evaluation(tmp_path):
    from datasets import Dataset

    trainer = train(tmp_path, instrumented=UNLIMITED | {"every": 2}, max_steps=4)
    assert [len(step) > 0 for step in logged(trainer)] == [True, False, True, False]
    before = repr(trainer.gap_monitor)
    assert "(measured)" in before  # so that an evaluation would be, too
    trainer.evaluate(Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"]}))
    assert repr(trainer.gap_monitor) == before
