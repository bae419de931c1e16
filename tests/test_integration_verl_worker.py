"""A step of verl's own TrainingWorker (FSDP2, gloo) with a measured loss: the same training, and its figures."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl.trainer", reason="needs verl: pip install verl")
pytest.importorskip("uvicorn", reason="verl's workers need it: pip install uvicorn")

from gloo_ranks import Ranks
from verl_ranks import WORLDS, save_model, work

from rlvr_fast.integrations.verl_update import KEY, UPDATE_METRICS

AFTER_A_STEP = 2e-4  # relative; the weights have moved by a step of Adam whose gradients were summed in another order
FLOAT32 = 1e-5  # relative; softmax and products of the same numbers in another order


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Ranks]:
    folder = tmp_path_factory.mktemp("verl")
    save_model(folder)
    return Ranks.run(work, folder, WORLDS)


@pytest.mark.parametrize("count", WORLDS)
def test_training_is_bitwise_the_same(worlds, count):
    for (stock, weights), (own, own_weights) in zip(worlds[count].answers("vanilla"),
                                                     worlds[count].answers("rlvr:vanilla"), strict=True):
        assert all(torch.equal(own_weights[name], value) for name, value in weights.items())
        timing = {"actor/mfu", "actor/perf/cpu_memory_used_gb"}
        assert {key: own[key] for key in stock.keys() - timing} == {key: stock[key] for key in stock.keys() - timing}
        assert own.keys() - stock.keys() == {metric.key for metric in UPDATE_METRICS}
        assert not any(KEY in key for key in own)


@pytest.mark.parametrize("mode", ["rlvr:vanilla", "rlvr:gspo"])
def test_two_ranks_log_the_figures_of_one(worlds, mode):
    keys = {metric.key for metric in UPDATE_METRICS}
    alone, *_ = worlds[1].answers(mode)
    for found, _ in worlds[2].answers(mode):
        assert {key: found[key] for key in keys} == pytest.approx({key: alone[0][key] for key in keys},
                                                               rel=AFTER_A_STEP)
    assert 0 < alone[0]["rlvr/update/effective_share"] < 1
    assert alone[0]["rlvr/update/frac_signal"] == 0.75


@pytest.mark.parametrize("count", WORLDS)
def test_sum_pi_squared_beside_fused_kernels(worlds, count):
    """What verl refuses, the engine gives: its log-probs and entropies, and the Σp² that it has from logits."""
    for refusal in worlds[count].answers("refused"):
        assert "calculate_sum_pi_squared=True is not supported with use_fused_kernels=True" in refusal
    names = ("fused", "verl's fused", "logits", "own engine, logits")
    for fused, stock, logits, own in zip(*(worlds[count].answers(name) for name in names), strict=True):
        assert all(torch.equal(fused[name], value) for name, value in stock.items())
        for name in ("sum_pi_squared", "entropy"):
            torch.testing.assert_close(fused[name], logits[name], rtol=FLOAT32, atol=1e-6)
        assert all(torch.equal(own[name], value) for name, value in logits.items())
        assert fused["sum_pi_squared"].std() > 0.01


def test_packed_micro_batches_give_every_token_its_own(worlds):
    """Without padding between the sequences, as verl runs by default."""
    for packed, padded in zip(worlds[1].answers("packed"), worlds[1].answers("fused"), strict=True):
        torch.testing.assert_close(packed["sum_pi_squared"], padded["sum_pi_squared"], rtol=FLOAT32, atol=1e-6)
