"""A StepGuard as the optimizer of a real GRPOTrainer: what it sees, what it leaves alone, checkpoints, the example."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl.trainer", reason="needs TRL: pip install trl")
pytest.importorskip("datasets")

import torch
from trl_training import QUIET, UNLIMITED, entries, logged, model, tokenizer, train, trainer_of

from rlvr_fast.step.guard import StepGuard, StepWarning

EXAMPLES = Path(__file__).parents[1] / "examples"


def guarded(folder, mode, *, rate=0.05, **options):
    """An SGD run with a guard of ``mode``, or without one, and the guard."""
    own = model()
    optimizer = torch.optim.SGD(own.parameters(), lr=rate)
    guard = None if mode is None else StepGuard(optimizer, mode, share=None)
    instrumented = None if mode is None else UNLIMITED | {"guard": guard}
    trainer = trainer_of(folder, own_model=own, optimizer=guard or optimizer, instrumented=instrumented, **options)
    return trainer, guard


def test_a_guard_observes_fresh_completions_and_leaves_training_as_it_is(tmp_path):
    runs = []
    for mode in ("warn", None):
        trainer, _ = guarded(tmp_path, mode, max_steps=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StepWarning)
            trainer.train()
        runs.append(trainer)
    for own, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(own, other)
    found = logged(runs[0])
    assert [step["rlvr/step/guard/measured"] for step in found] == [0.0, 1.0, 2.0]
    assert any(key.startswith("rlvr/step/meter/") for key in found[1])


def test_a_guard_observes_in_steps_that_the_monitor_leaves_out(tmp_path):
    own = model()
    guard = StepGuard(torch.optim.SGD(own.parameters(), lr=0.05), "scale", share=None)
    trainer = train(tmp_path, own_model=own, optimizer=guard, max_steps=4,
                    instrumented=UNLIMITED | {"guard": guard, "every": 3})
    assert ["rlvr/group/p_mean" in step for step in logged(trainer)] == [True, False, False, True]
    assert [step["rlvr/step/guard/measured"] for step in logged(trainer)] == [0.0, 1.0, 2.0, 3.0]


def test_what_the_guard_sees_are_the_log_probs_of_the_next_completions(tmp_path):
    """The last observation, made again from the same completions with plain forward passes."""
    trainer, guard = guarded(tmp_path, "warn", max_steps=2, temperature=0.7)
    seen = {}

    def observe(logp_fn, rollouts):
        seen.update(logp=logp_fn(), rollouts=rollouts, training=trainer.model.training)
        return StepGuard.observe(guard, logp_fn, rollouts)

    def compute_loss(own_model, inputs, *args, **kwargs):
        seen["inputs"] = inputs
        seen["weights"] = {name: value.clone() for name, value in own_model.state_dict().items()}
        return original(own_model, inputs, *args, **kwargs)

    original, guard.observe, trainer.compute_loss = trainer.compute_loss, observe, compute_loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StepWarning)
        trainer.train()
    inputs, after = seen["inputs"], model()
    after.load_state_dict(seen["weights"])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        logits = after(input_ids=ids, attention_mask=attention).logits[:, -width - 1:-1] / 0.7
    logp = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None]).squeeze(2)
    inside = inputs["completion_mask"].bool()
    rollouts = seen["rollouts"]
    assert not seen["training"]  # no dropout
    assert trainer.model.training
    assert rollouts.n_responses == len(ids)
    # TRL shuffled them between the observation and the loss.
    own = torch.segment_reduce(rollouts.pack(seen["logp"]), "sum", lengths=rollouts.lengths)
    again = torch.where(inside, logp, 0.0).sum(1)
    assert torch.allclose(own.sort().values, again.sort().values, atol=1e-4)
    assert rollouts.correct.sum() == inputs["rlvr_reward"].sum()


def test_a_guard_of_mode_scale_shortens_the_steps_that_it_takes(tmp_path):
    ends = []
    for mode in (None, "scale"):
        trainer, _ = guarded(tmp_path, mode, max_steps=1)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert entries(trainer)[0]["rlvr/step/guard/scale"] == pytest.approx(0.2)  # before anything was measured
    for name, start in model().state_dict().items():
        assert torch.allclose(ends[1][name] - start, 0.2 * (ends[0][name] - start), atol=1e-6), name
    assert any(not torch.equal(ends[0][name], start) for name, start in model().state_dict().items())


def test_a_checkpoint_keeps_what_the_guard_knows(tmp_path):
    options = {"max_steps": 4, "lr_scheduler_type": "constant"}
    first, guard = guarded(tmp_path / "one", "scale", **options | QUIET | {"save_strategy": "steps", "save_steps": 2})
    first.train()
    again, resumed = guarded(tmp_path / "two", "scale", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert (resumed.n_steps, guard.n_steps) == (4, 4)
    # The update of the step before the checkpoint is not kept, so that one measurement fewer is made.
    assert (resumed.n_measured, guard.n_measured) == (2, 3)
    assert [entry["step"] for entry in entries(again)] == [1, 2, 3, 4]


def test_a_guard_that_is_not_the_optimizer_is_refused(tmp_path):
    own = model()
    guard = StepGuard(torch.optim.SGD(own.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="guard must be the StepGuard that is the trainer's optimizer"):
        train(tmp_path, own_model=own, instrumented={"guard": guard})


@pytest.mark.parametrize("guard", [None, "scale"])
def test_the_example_runs(tmp_path, guard):
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLES / "trl_grpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainer = example.train(model(), tokenizer(), guard=guard, per_device_train_batch_size=8, max_steps=1, **QUIET,
                            output_dir=str(tmp_path))
    assert "rlvr/group/p_mean" in logged(trainer)[0]
    assert ("rlvr/step/guard/scale" in logged(trainer)[0]) == (guard is not None)
    assert example.is_right([" 12\n3", "13"], ["12", "12"]) == [1.0, 0.0]
