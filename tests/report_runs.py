"""Runs for the tests of the report: made of the library's own results, with everything that a page can show."""

import json
import math

import torch

import rlvr_fast as rf
from rlvr_fast.gap import gap_from_gradients
from rlvr_fast.model_gap.interference import Interference
from rlvr_fast.run_log import RunLog
from rlvr_fast.spectrum import DifficultySpectrum, difficulty_spectrum

HOSTILE = ("<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=alert(3)>",
           "{{ 7 * 7 }} ${alert(4)} `\u2028", "<!-- ]]> <b>bold</b> &amp; \ud800 \x00", "javascript:alert(5)")


def gap_of(prompt_ids, *, level="logits", width=60, seed=0) -> rf.Gap:
    """Prompts of rising success rate with 8 responses each; half of them have a gap along the first coordinates."""
    generator = torch.Generator().manual_seed(seed)
    n = len(prompt_ids)
    success = torch.linspace(0.05, 0.95, n)
    correct = torch.rand(n, 8, generator=generator) < success[:, None]
    gradients = torch.randn(n, 8, width, generator=generator)
    direction = torch.where(torch.arange(n) % 2 == 0, 1.0, -0.5)
    gradients[..., :3] += 4 * (correct * direction[:, None])[..., None]
    responses = rf.Responses(correct.flatten(), torch.arange(n).repeat_interleave(8), tuple(prompt_ids))
    return gap_from_gradients(rf.ResponseGradients(responses, gradients.flatten(0, 1)), level=level, length_norm=True)


def spectrum_of(gap: rf.Gap) -> DifficultySpectrum:
    n = len(gap.prompt_ids)
    return difficulty_spectrum(gap, [at * 4 // n for at in range(n)], n_permutations=199)


def interference_of(gap: rf.Gap) -> Interference:
    vectors = gap.vector.double()
    products = (vectors @ vectors.T).diagonal_scatter(gap.norm_sq)
    return Interference(torch.where(gap.defined[:, None] & gap.defined, products, torch.nan),
                        gap.norm_sq > 2 * gap.stderr, gap.prompt_ids)


def meter_metrics(step: int) -> dict[str, float]:
    """What a StepMeter and a GapMonitor log; the step grows past its break-even at about step 30."""
    even = 4 * math.exp(-step / 20)
    metrics = {
        "rlvr/step/meter/success": 0.3 + 0.4 * (1 - math.exp(-step / 15)), "rlvr/step/meter/n_prompts": 64.0,
        "rlvr/step/meter/break_even": even, "rlvr/step/meter/break_even_low": 0.7 * even,
        "rlvr/step/meter/break_even_high": 1.4 * even, "rlvr/step/meter/gain": 0.02 - 0.0006 * step,
        "rlvr/step/meter/gain_stderr": 0.004, "rlvr/gap/norm_sq": 0.2 + 0.05 * math.sin(step),
        "rlvr/gap/norm_sq_stderr": 0.03, "rlvr/group/frac_mixed": 0.8, "rlvr/group/frac_solved": 0.15,
        "rlvr/group/frac_failed": 0.05, "rlvr/length/mean": 120 + step, "rlvr/length/bias_index": 0.1,
        "rlvr/gap/cos_update": 0.9 - 0.01 * step, "rlvr/signal_to_noise": 0.5, "rlvr/sharpening/alignment": 1.0}
    for at, (low, slope) in enumerate(((0, 0.02), (0.2, 0.03), (0.4, 0.004), (0.6, -0.01), (0.8, -0.03))):
        label = f"rlvr/step/meter/bin_{low:.2g}_{low + 0.2:.2g}"
        metrics |= {f"{label}/n_prompts": 10.0 + at, f"{label}/end_slope": slope, f"{label}/end_slope_stderr": 0.004,
                    f"{label}/break_even": math.nan}
    return metrics


def full_run(folder, *, n_steps=40, prompt_ids=None, decode=None) -> None:
    """Everything: metrics, details and a rollout dump."""
    prompt_ids = prompt_ids or [f"{a} + {a + 7} =" for a in range(24)]
    log = RunLog(folder)
    for step in range(n_steps):
        log.log(step, meter_metrics(step))
    gap = gap_of(prompt_ids)
    log.detail(spectrum=spectrum_of(gap), interference=interference_of(gap), tokens=gap,
               decode=decode or (lambda token: f" tok{token}"))
    write_rollouts(folder / "rollouts.jsonl", prompt_ids, n_steps=min(n_steps, 5))


def write_rollouts(path, prompt_ids, *, n_steps=3) -> None:
    rows = [{"step": step, "prompt": prompt, "reward": float((at + i + step) % 3 == 0), "length": 10 + i + step}
            for step in range(n_steps) for at, prompt in enumerate(prompt_ids) for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
