"""A user's file: the public API as loops call it. It is never run; a type checker reads it (tests/test_typing.py)."""

from collections.abc import Callable, Hashable
from typing import assert_type

import torch
from torch import Tensor, nn

import rlvr_fast as rf


def measure(model: nn.Module, head: nn.Linear, hidden: Tensor, ids: Tensor, mask: Tensor, rewards: Tensor) -> None:
    rollouts = rf.Rollouts.from_padded(ids, mask, rewards, group_size=8)
    assert_type(rollouts, rf.Rollouts)
    assert_type(rollouts.pack(hidden), Tensor)
    assert_type(rollouts.n_prompts, int)
    assert_type(rollouts.prompt_ids, tuple[Hashable, ...])
    names: list[str] = ["a", "b"]
    assert_type(rf.Rollouts.from_packed(ids[0], mask[0], rewards, names, threshold=0.5), rf.Rollouts)

    stats = rf.token_stats(hidden, head.weight, rollouts.tokens, hidden_grad=True)
    assert_type(stats.logp, Tensor)
    assert_type(stats.entropy, Tensor | None)
    logp, entropy = rf.linear_logprob(hidden, head.weight, rollouts.tokens, bias=head.bias)
    assert_type(logp, Tensor)
    assert_type(entropy, Tensor)
    weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "vl_norm", alpha=0.75), "dr_grpo", max_length=512)
    assert_type(weights, Tensor)
    assert_type(rf.advantages_and_weights(rollouts, "grpo", "dapo"), tuple[Tensor, Tensor])

    gap = rf.gradient_gap(hidden, head.weight, rollouts, level="hidden")
    assert_type(gap, rf.Gap)
    assert_type(gap.norm_sq, Tensor)
    assert_type(gap.success_rate, Tensor)
    assert_type(gap.vector, Tensor | None)
    assert_type(gap.gram, tuple[Tensor, ...])
    assert_type(gap.prompt_ids, tuple[Hashable, ...])
    assert_type(gap.batch_norm_sq(), tuple[Tensor, Tensor])
    assert_type(gap.summary(), dict[str, float])
    assert_type(gap.moments + gap.moments, rf.Moments)

    with rf.ModelGap(model, rollouts, "sketch", direction={head.weight: hidden}) as probe:
        assert_type(probe, rf.ModelGap)
        probe.backward(logp)
    result = probe.gap()
    assert_type(result, rf.ModelGapResult)
    assert_type(result.stderr, Tensor)
    assert_type(result.alignment, Tensor | None)
    assert_type(result.level, str)
    assert_type(result.step_alignment().alignment, Tensor)

    spectrum = rf.difficulty_spectrum([gap, result], "success_rate")
    assert_type(spectrum, rf.DifficultySpectrum)
    by_id: dict[str, float] = {"a": 0.5}
    assert_type(rf.difficulty_spectrum(gap, by_id).bins.verdict, tuple[str, ...])
    shares: dict[str, float] = {"easy": 1.0, "hard": 3.0}
    assert_type(spectrum.mixture(base=shares), rf.Mixture)
    bins: dict[str, list[int]] = {"easy": [0, 1], "hard": [2]}
    rf.SpectrumSampler(bins, batch_size=4, n_batches=10, mixture=shares)

    monitor = rf.GapMonitor(level="hidden", group_size=8)
    monitor.update(rollouts, stats=stats, gap=gap)
    monitor.update(prompt_ids=names, rewards=rewards)
    assert_type(monitor.compute(), dict[str, float])
    log = rf.RunLog("outputs/run")
    log.log(0, monitor.compute() | {"verdict": "safe"})
    log.detail(spectrum=spectrum, interference=result.conflicts(), decode=str)


def keep_the_step(optimizer: torch.optim.Adam, parameters: list[nn.Parameter], logp_fn: Callable[[], Tensor],
                  rollouts: rf.Rollouts) -> None:
    update = rf.propose(optimizer, parameters)
    assert_type(update, dict[Tensor, Tensor])
    curve = rf.scan_step(logp_fn, parameters, update, rollouts)
    assert_type(curve, rf.StepCurve)
    assert_type(curve.verdict, str)
    assert_type(curve.break_even, Tensor)
    assert_type(rf.scan_step(logp_fn, parameters, list(update.values()), rollouts).summary(), dict[str, float])
    step = rf.measure_step(logp_fn(), logp_fn(), rollouts, in_sample=False)
    assert_type(step, rf.StepMeasure)
    assert_type(step.success_gain, Tensor)

    guard = rf.StepGuard(optimizer, mode="scale")
    assert_type(guard.observe(logp_fn, rollouts), rf.StepReading | None)
    guard.step()
    assert_type(guard.metrics(), dict[str, float])
    scores = rf.directional_scores(logp_fn, parameters, update, rollouts)
    assert_type(scores.slope, Tensor | None)
    meter = rf.StepMeter()
    meter.end(rollouts, scores)
    assert_type(meter.reading().break_even, float)
    with rf.StepRecorder(parameters) as recorder:
        optimizer.step()
    assert_type(recorder.update, dict[Tensor, Tensor] | None)
    assert_type(rf.adam_direction(optimizer), dict[Tensor, Tensor])

    assert_type(rf.theorem_step_bound(0.5, 1.0, 1.0), float)
    assert_type(rf.theorem_step_bound(curve.break_even, 1.0, 1.0), Tensor)
    assert_type(rf.token_step_bound(0.5, 0.25, 512, 1.0, 1.0), float)
    assert_type(rf.kappa(0.5, 8, "grpo"), Tensor)
    assert_type(rf.recover_from_advantages(logp_fn(), 8).success_rate, Tensor)
    assert_type(rf.available_backends("cuda"), dict[str, str | None])
    shard = rf.VocabularyShard.even(151_936)
    assert_type(shard.stop, int)
    assert_type(rf.warm_up(parameters[0]), rf.WarmUpReport)
    assert_type(rf.tune_head((151_936, 3584), n_tokens=8192).chip, str)
