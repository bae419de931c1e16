"""What a measured policy loss of verl reports: sums against a loop over tokens, averaged by verl's own hands."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl.trainer", reason="needs verl: pip install verl")

from verl.trainer.ppo import core_algos
from verl.utils.metric import Metric
from verl.utils.py_functional import append_to_dict, rename_dict
from verl.workers.utils.losses import ppo_loss
from verl_steps import SUM_KEYS, LossInputs, actor, run, sums_of

from rlvr_fast.integrations import verl as integration
from rlvr_fast.integrations.verl_update import KEY, SUMS, UPDATE_METRICS, combine, update_sums

STOCK = tuple(name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("rlvr:"))
FLOAT32 = 1e-5  # sums of some fifty float32 numbers in another order
# What these do to a token depends on the other tokens of its micro-batch, or on how many responses that has.
LOCAL = {"clip_cov", "kl_cov", "geo_mean"}


@pytest.fixture(autouse=True)
def installed():
    integration.install()


def by_hand(inputs: LossInputs, clip: float = 0.2) -> dict[str, float]:
    """The sums of ``vanilla`` with token-mean, one token at a time: w = Aρ/N, or 0 where the clip is in force."""
    found = dict.fromkeys(SUMS, 0.0)
    n = int(inputs.response_mask.sum())
    for row in range(len(inputs.log_prob)):
        mask = inputs.response_mask[row]
        logp, old = inputs.log_prob[row][mask].double().tolist(), inputs.old_log_prob[row][mask].double().tolist()
        a = float(inputs.advantages[row, 0])
        c = 0.0
        for now, then in zip(logp, old, strict=True):
            rho, p = math.exp(now - then), math.exp(now)
            clipped = (a > 0 and rho > 1 + clip) or (a < 0 and (rho < 1 - clip or rho > 3))
            w = 0.0 if clipped else a * rho / n
            c += abs(w)
            found["tokens"] += 1
            found["kl"] += rho - 1 - (now - then)
            found["score"] += (1 - p) ** 2
            found["moved_up"] += (a > 0) * (now - then)
            found["moved_down"] += (a < 0) * (now - then)
            found["tokens_up"] += a > 0
            found["tokens_down"] += a < 0
            found["tokens_signal"] += a != 0
            found["silent"] += a != 0 and clipped
            found["weight"] += abs(w)
            found["weight_down"] += abs(w) * (w < 0)
            found["power"] += w * w * (1 - p) ** 2
            found["power_down"] += w * w * (1 - p) ** 2 * (w < 0)
        rho = math.exp(sum(logp) - sum(old))
        found["responses"] += 1
        found["signal"] += a != 0
        found["up"] += a > 0
        found["ratio"] += rho
        found["ratio_sq"] += rho ** 2
        found["weight_sq"] += c ** 2
    return {KEY + name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_sums_of_the_clipped_loss_are_those_of_a_loop_over_tokens(seed):
    inputs = LossInputs.sample(seed, responses=24, moved=0.8)
    expected = by_hand(inputs)
    assert sums_of("rlvr:vanilla", inputs) == pytest.approx(expected, rel=FLOAT32, abs=1e-6)
    assert 0 < expected[KEY + "silent"] < expected[KEY + "tokens_signal"] < expected[KEY + "tokens"]


def test_the_figures_are_what_their_formulas_say():
    s = {name: float(i + 2) for i, name in enumerate(SUMS)}
    found = combine({f"actor/{KEY}{name}": value for name, value in s.items()} | {"actor/pg_loss": 1.0})
    assert found == pytest.approx({
        "rlvr/update/frac_signal": s["signal"] / s["responses"], "rlvr/update/frac_up": s["up"] / s["signal"],
        "rlvr/update/frac_silent": s["silent"] / s["tokens_signal"],
        "rlvr/update/down_share": s["weight_down"] / s["weight"],
        "rlvr/update/effective_share": s["weight"] ** 2 / (s["responses"] * s["weight_sq"]),
        "rlvr/update/score_floor": s["score"] / s["tokens"],
        "rlvr/update/power_down_share": s["power_down"] / s["power"], "rlvr/update/kl": s["kl"] / s["tokens"],
        "rlvr/update/ess": s["ratio"] ** 2 / (s["responses"] * s["ratio_sq"]),
        "rlvr/update/moved_up": s["moved_up"] / s["tokens_up"],
        "rlvr/update/moved_down": s["moved_down"] / s["tokens_down"]})
    assert {metric.key for metric in UPDATE_METRICS} == found.keys()


@pytest.mark.parametrize("name", sorted(set(STOCK) - LOCAL))
def test_micro_batches_of_any_size_sum_to_the_whole_batch(name):
    """With the normalisation that verl's engines set: by tokens and responses of the whole mini-batch."""
    whole = LossInputs.sample(3)
    count = {"tokens": int(whole.response_mask.sum()), "responses": len(whole.response_mask)}
    parts = [sums_of(f"rlvr:{name}", whole[rows], **count) for rows in (slice(0, 1), slice(1, 6), slice(6, 8))]
    expected = sums_of(f"rlvr:{name}", whole, **count)
    assert {key: sum(part[key] for part in parts) for key in SUM_KEYS} == pytest.approx(expected, rel=FLOAT32, abs=1e-7)
    assert expected[KEY + "weight"] > 0


def test_the_drivers_log_has_the_figures_of_all_ranks_and_micro_batches_pooled():
    """By verl's own hands: two ranks, two mini-batches of two micro-batches, then the driver's prefix and mean."""
    from verl.utils.metric import reduce_metrics

    parts = [[[LossInputs.sample(100 * rank + 10 * mini + micro, responses=2 + micro) for micro in range(2)]
              for mini in range(2)] for rank in range(2)]
    tokens = 60  # the engine's count for the mini-batch; every mini-batch has one, so any constant will do
    pooled = dict.fromkeys(SUM_KEYS, 0.0)
    step: dict = {}
    for mini in range(2):
        ranks = []
        for rank in range(2):
            metrics: dict = {}
            for inputs in parts[rank][mini]:
                output, data = inputs.jagged(dp_size=2, tokens=tokens, responses=10)
                found = ppo_loss(actor("rlvr:vanilla"), output, data)[1]
                append_to_dict(metrics, found)
                for key in SUM_KEYS:
                    pooled[key] += found[key].aggregate()
            ranks.append(metrics)
        append_to_dict(step, {key: Metric.aggregate_dp([metrics[key] for metrics in ranks]) for key in ranks[0]})
    logged = reduce_metrics(rename_dict(step, "actor/"))
    own = {key: value for key, value in logged.items() if "rlvr/" in key}
    assert own == pytest.approx(combine(pooled), rel=1e-9)
    assert own.keys() == {metric.key for metric in UPDATE_METRICS}
    assert {"actor/pg_loss", "actor/pg_clipfrac"} <= logged.keys()
    assert not any(KEY in key for key in logged)


def test_ratios_of_means_not_means_of_ratios():
    """What a plain metric would have logged: each micro-batch's own share, averaged."""
    parts = [LossInputs.sample(0, responses=1), LossInputs.sample(1, responses=7)]
    sums = [sums_of("rlvr:vanilla", part) for part in parts]
    shares = [combine(part).get("rlvr/update/frac_signal", 0.0) for part in sums]
    pooled = combine({key: (sums[0][key] + sums[1][key]) / 2 for key in SUM_KEYS})["rlvr/update/frac_signal"]
    assert pooled == pytest.approx((shares[0] * 1 + shares[1] * 7) / 8)
    assert pooled != pytest.approx(sum(shares) / 2)


def test_no_key_contains_what_verl_reduces_by():
    keys = SUM_KEYS | {f"actor/{key}" for key in SUM_KEYS} | {metric.key for metric in UPDATE_METRICS}
    assert not [key for key in keys if "min" in key or "max" in key]
    assert len({metric.key for metric in UPDATE_METRICS}) == len(UPDATE_METRICS)


def empty(inputs: LossInputs) -> LossInputs:
    nothing = torch.zeros_like(inputs.response_mask)
    return LossInputs(inputs.old_log_prob, inputs.log_prob, inputs.advantages * 0, nothing)


def no_advantage(inputs: LossInputs) -> LossInputs:
    return LossInputs(inputs.old_log_prob, inputs.log_prob, torch.zeros_like(inputs.advantages), inputs.response_mask)


def garbage_in_padding(inputs: LossInputs) -> LossInputs:
    return LossInputs(*(torch.where(inputs.response_mask, value, torch.nan) for value in
                        (inputs.old_log_prob, inputs.log_prob, inputs.advantages)), inputs.response_mask)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("change", "absent"), [
    (empty, {metric.key for metric in UPDATE_METRICS}),
    (no_advantage, {f"rlvr/update/{name}" for name in ("frac_up", "frac_silent", "moved_up", "moved_down")})])
def test_a_micro_batch_without_tokens_or_advantages_gives_no_nan(name, change, absent):
    if change is empty and name == "bypass_mode":
        pytest.skip("verl's own bypass_mode refuses a micro-batch without tokens")
    _, metrics, _, _ = run(f"rlvr:{name}", change(LossInputs.sample()), actor(name))
    sums = {key: metrics[key] for key in SUM_KEYS}
    assert all(math.isfinite(value) for value in sums.values())
    assert not absent & combine(sums).keys()
    assert all(math.isfinite(value) for value in combine(sums).values())


def test_one_response_and_padding_that_holds_nan():
    clean = LossInputs.sample(2, responses=2)[1:]
    assert 0 < int(clean.response_mask.sum()) < clean.response_mask.numel()
    dirty = garbage_in_padding(clean)
    found = []
    for inputs in (clean, dirty):
        log_prob = inputs.log_prob.clone().requires_grad_()
        loss = -(torch.where(inputs.response_mask, inputs.advantages * log_prob, 0.0)).sum()
        found.append(update_sums(loss, inputs.old_log_prob, log_prob, inputs.advantages, inputs.response_mask))
    assert found[0] == found[1]
    assert found[0][KEY + "responses"] == 1
    assert combine(found[0])["rlvr/update/effective_share"] == pytest.approx(1.0)


def test_a_policy_that_has_gone_far_off_stays_finite():
    inputs = LossInputs.sample()
    far = LossInputs(inputs.old_log_prob - 200, inputs.log_prob, inputs.advantages, inputs.response_mask)
    assert all(math.isfinite(value) for value in sums_of("rlvr:vanilla", far).values())


def test_an_evaluation_without_gradients_has_no_figures_of_the_coefficients():
    config = actor("vanilla")
    with torch.no_grad():
        _, metrics = core_algos.get_policy_loss_fn("rlvr:vanilla")(**LossInputs.sample().arguments(config))
    assert metrics.keys() >= SUM_KEYS
    assert metrics[KEY + "silent"] == metrics[KEY + "weight"] == 0
    found = combine(metrics)
    assert not {f"rlvr/update/{name}" for name in ("frac_silent", "down_share", "effective_share")} & found.keys()
    assert found["rlvr/update/frac_signal"] == 0.75


def test_without_or_with_some_of_the_sums():
    assert combine({"actor/pg_loss": 1.0}) == {}
    with pytest.raises(ValueError, match=r"metrics must hold all of rlvr/sum/\.\.\., got 1 of them without signal"):
        combine({f"{KEY}responses": 1.0})


def test_the_example_logs_every_figure(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("verl_measured_loss",
                                                  Path(__file__).parents[1] / "examples" / "verl_measured_loss.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "ROUNDS", 1)
    found = example.main()
    assert {metric.key for metric in UPDATE_METRICS} <= found.keys()
    assert found["rlvr/update/down_share"] > 0.5  # incorrect responses are longer there
    assert "ms per micro-batch" in capsys.readouterr().out
