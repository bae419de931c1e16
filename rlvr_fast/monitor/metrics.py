"""The metrics of a monitor: one entry each with its formula, tier, unit and source, as a function of a window's sums.

Tiers say what must have been fed: 0 verdicts or advantages, 1 log-probs, 2 Σp² or entropy, 3 response gradients (hidden
states and lm_head), 4 a ModelGap, 5 a measured step. A metric whose sums are missing, or whose denominator is 0, does
not exist in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Sums = dict[str, float]


@dataclass(frozen=True, repr=False)
class Metric:
    """One metric.

    Attributes:
        key: its name in every logger. Loggers reduce by the letters m-i-n and m-a-x in a key: there are none.
        tier: what must have been fed, 0 to 5.
        unit: of the value; "1" for a pure number.
        meaning: formula and reading.
        source: tag of the formula's origin.
        value: from the window's sums; None where they do not tell.
    """

    key: str
    tier: int
    unit: str
    meaning: str
    source: str
    value: Callable[[Sums], float | None]

    def __repr__(self) -> str:
        return f"{self.key} [{self.unit}, tier {self.tier}, {self.source}]: {self.meaning}"


def _ratio(numerator: str, denominator: str) -> Callable[[Sums], float | None]:
    def value(s: Sums) -> float | None:
        return s[numerator] / s[denominator] if numerator in s and s.get(denominator, 0.0) > 0 else None

    return value


def _when(*names: str) -> Callable[[Callable[[Sums], float | None]], Callable[[Sums], float | None]]:
    """A value that needs these sums, the last of them above 0."""
    def wrap(formula: Callable[[Sums], float | None]) -> Callable[[Sums], float | None]:
        def value(s: Sums) -> float | None:
            return formula(s) if all(name in s for name in names) and s[names[-1]] > 0 else None

        return value

    return wrap


def _contrast(name: str) -> Callable[[Sums], float | None]:
    return _when(f"{name}_pos", f"{name}_neg", f"{name}_prompts")(
        lambda s: (s[f"{name}_pos"] - s[f"{name}_neg"]) / s[f"{name}_prompts"])


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


def _gap_stderr(s: Sums) -> float | None:
    norm = _root(s["gap_norm_sq"] / s["gaps"])
    return _root(s["var_gap"]) / s["gaps"] / (2 * norm) if norm > 0 else None


def _bias_index(s: Sums) -> float | None:
    both = s["length_pos"] + s["length_neg"]
    return (s["length_neg"] - s["length_pos"]) / both if both > 0 else None


def _cosine(s: Sums) -> float | None:
    scale = _root(s["update_gap_norm_sq"]) * _root(s["update_norm_sq"])
    return s["gap_dot_update"] / scale if scale > 0 else None


def _slope_stderr(s: Sums) -> float | None:
    n = s["slope_prompts"]
    if n < 1.5:  # one prompt has no spread; a running mean of windows of one neither
        return None
    mean = (s["slope_pos"] - s["slope_neg"]) / n
    return _root((s["slope_gap_sq"] / n - mean * mean) / (n - 1))


def _control(s: Sums) -> float | None:
    mean = s["slope"] / s["slopes"]
    spread = _root((s["slope_sq"] / s["slopes"] - mean * mean) / s["slopes"])
    return mean / spread if spread > 0 else None


def _lr_bound(s: Sums) -> float | None:
    """Only where the curvature is negative by two standard errors: else there is no threshold to see."""
    if s["step_curvature"] + 2 * _root(s["var_step_curvature"]) >= 0 or s["step_slope"] <= 0:
        return None
    return s["step_rate"] / s["steps"] * (-2 * s["step_slope"] / s["step_curvature"])


def _lr_ratio(s: Sums) -> float | None:
    bound = _lr_bound(s)
    return None if bound is None else s["step_rate"] / s["steps"] / bound


METRICS: tuple[Metric, ...] = (
    # -- tier 0: verdicts or advantages
    Metric("rlvr/group/frac_mixed", 0, "1", "share of prompts whose group has both classes; these alone have a gap",
           "[derived]", _ratio("mixed", "settled")),
    Metric("rlvr/group/frac_solved", 0, "1", "share of prompts whose group is all correct", "[derived]",
           _ratio("solved", "placed")),
    Metric("rlvr/group/frac_failed", 0, "1", "share of prompts whose group is all incorrect", "[derived]",
           _ratio("failed", "placed")),
    Metric("rlvr/group/p_mean", 0, "1", "success rate p, mean over prompts", "[paper A]", _ratio("rate", "rated")),
    Metric("rlvr/group/p_mixed", 0, "1", "success rate p, mean over mixed prompts; known from advantages alone",
           "[derived]", _ratio("mixed_rate", "revealed")),
    Metric("rlvr/group/frac_unscored", 0, "1", "share of responses with reward NaN (no verdict)", "count",
           _ratio("unscored", "scored")),
    Metric("rlvr/gap/kappa", 0, "1", "κ = ½ mean|A| of a group, mean over prompts: with it (1/G) Σ A_i s_i = κ · gap, "
           "for every estimator that subtracts the group's own mean", "[derived]", _ratio("kappa", "weighted")),
    Metric("rlvr/length/mean", 0, "tokens", "length of a response", "count", _ratio("length", "lengths")),
    Metric("rlvr/length/bias_index", 0, "1", "(L̄⁻ − L̄⁺)/(L̄⁻ + L̄⁺) with L̄± the mean over mixed prompts of the mean "
           "length of a class: > 0 where incorrect responses are longer; 1/|o| in the loss then punishes their tokens "
           "less",
           "[derived]", _when("length_pos", "length_neg", "length_prompts")(_bias_index)),
    # -- tier 1: log-probs
    Metric("rlvr/logp/token", 1, "nats", "log-prob of a sampled token; minus it estimates the entropy on policy",
           "[derived]", _ratio("logp", "logp_tokens")),
    Metric("rlvr/logp/gap", 1, "nats", "log-prob per token of correct less that of incorrect responses, mean over "
           "mixed prompts: above 0 the policy prefers what is right", "[derived]", _contrast("token_logp")),
    Metric("rlvr/ratio/kl", 1, "nats", "mean over tokens of ρ − 1 − log ρ, ρ = e^(logp − old_logp): estimates "
           "KL(old ‖ current) per token", "k3 estimator", _ratio("divergence", "divergence_tokens")),
    Metric("rlvr/ratio/mean", 1, "1", "mean over responses of ρ = Π_t ρ_t; 1 where the rollouts come from old_logp's "
           "policy", "[derived]", _ratio("ratio", "ratios")),
    Metric("rlvr/ratio/ess", 1, "1", "effective share (Σρ)²/(R Σρ²) of the responses", "Kish",
           _when("ratio", "ratios", "ratio_sq")(lambda s: s["ratio"] ** 2 / (s["ratios"] * s["ratio_sq"]))),
    # -- tier 2: Σp², entropy
    Metric("rlvr/token/score_sq", 2, "1", "‖∂log p_y/∂z‖² = 1 − 2 p_y + Σp², mean over tokens", "[derived]",
           _ratio("score_sq", "score_tokens")),
    Metric("rlvr/token/collision", 2, "1", "Σp², mean over tokens", "[derived]", _ratio("collision", "score_tokens")),
    Metric("rlvr/token/entropy", 2, "nats", "−Σ p log p, mean over tokens", "[derived]",
           _ratio("entropy", "entropy_tokens")),
    Metric("rlvr/token/energy_pos", 2, "1", "Σ_t c_t² ‖∂log p_t/∂z_t‖² of a correct response (c_t = 1/|o|, or 1 "
           "without length_norm). Over all responses its mean is that of ‖G_i‖² at level 'logits', because scores of "
           "different tokens are uncorrelated on policy; within a class it is that norm's diagonal part", "[derived]",
           _ratio("token_energy_pos", "token_n_pos")),
    Metric("rlvr/token/energy_neg", 2, "1", "the same of an incorrect response", "[derived]",
           _ratio("token_energy_neg", "token_n_neg")),
    Metric("rlvr/token/power_neg_share", 2, "1", "Σ_{A<0} A² E_i / Σ A² E_i with E_i that energy: share of the "
           "update's power that pushes responses down", "[derived]", _ratio("power_neg", "power")),
    Metric("rlvr/sharpening/alignment", 2, "nats", "d logit J / d log β for logits βz at β = 1, per mixed prompt "
           "mean⁺s − mean⁻s of s = Σ_t (log p_t + H_t): > 0 where a lower temperature raises the success rate",
           "[derived]", _contrast("slope")),
    Metric("rlvr/sharpening/stderr", 2, "nats", "its standard error over prompts", "[derived]",
           _when("slope_gap_sq", "slope_pos", "slope_neg", "slope_prompts")(_slope_stderr)),
    Metric("rlvr/sharpening/control_z", 2, "standard errors", "mean of s over all responses in its standard errors. On "
           "policy E[s] = 0: beyond ±3 the sampler and the trainer are different policies", "[derived]",
           _when("slope", "slope_sq", "slopes")(_control)),
    # -- tiers 3 and 4: gaps
    Metric("rlvr/gap/norm", 3, "level's", "root of rlvr/gap/norm_sq, clipped at 0", "[paper A]",
           _when("gap_norm_sq", "gaps")(lambda s: _root(s["gap_norm_sq"] / s["gaps"]))),
    Metric("rlvr/gap/stderr", 3, "level's", "standard error of rlvr/gap/norm (delta method); absent where that is 0",
           "[derived]", _when("gap_norm_sq", "var_gap", "gaps")(_gap_stderr)),
    Metric("rlvr/gap/norm_sq", 3, "level's²", "unbiased ‖g⁺ − g⁻‖², mean over mixed prompts; can be negative",
           "[derived]", _ratio("gap_norm_sq", "gaps")),
    Metric("rlvr/gap/norm_sq_stderr", 3, "level's²", "its standard error, jackknife over responses", "[derived]",
           _when("var_gap", "gaps")(lambda s: _root(s["var_gap"]) / s["gaps"])),
    Metric("rlvr/gap/norm_sq_naive", 3, "level's²", "the plug-in value, biased up by the noise", "[derived]",
           _ratio("gap_naive", "gaps")),
    Metric("rlvr/gap/energy_pos", 3, "level's²", "‖G_i‖², mean over correct responses", "[derived]",
           _ratio("energy_pos", "n_pos")),
    Metric("rlvr/gap/energy_neg", 3, "level's²", "‖G_i‖², mean over incorrect responses", "[derived]",
           _ratio("energy_neg", "n_neg")),
    Metric("rlvr/group/frac_pooled", 3, "1", "share of prompts that are mixed with a class of one response, which "
           "borrows the others' noise", "count", _ratio("pooled", "gap_prompts")),
    Metric("rlvr/signal_to_noise", 3, "1", "unbiased squared gap norm over the noise in the plug-in one", "[derived]",
           _ratio("gap_norm_sq", "gap_bias")),
    Metric("rlvr/gap/batch_norm_sq", 3, "level's²", "unbiased ‖mean over prompts of the gap vectors‖²: far below "
           "rlvr/gap/norm_sq where prompts pull in different directions", "[derived]",
           _ratio("batch_norm_sq", "batches")),
    Metric("rlvr/gap/cos_update", 3, "1", "cosine of the mean gap vector and the update Σ A_i G_i of the same "
           "responses, noise that agrees with itself taken off all three products; can leave [−1, 1]", "[derived]",
           _when("gap_dot_update", "update_norm_sq", "update_gap_norm_sq", "updates")(_cosine)),
    Metric("rlvr/gap/coverage", 4, "1", "share of ‖∇‖² in the parameters that the gap is about", "ModelGap",
           _ratio("coverage", "coverage_prompts")),
    Metric("rlvr/model/alignment", 4, "direction's", "⟨direction, g⁺ − g⁻⟩, mean over prompts", "[paper A]",
           _ratio("alignment", "alignment_prompts")),
    Metric("rlvr/model/predicted_log_odds_gain", 4, "nats", "first-order change of logit J by the direction, mean over "
           "prompts", "[derived]", _ratio("gain", "gain_prompts")),
    Metric("rlvr/model/predicted_log_odds_gain_stderr", 4, "nats", "its standard error over responses", "[derived]",
           _when("var_gain", "gain_prompts")(lambda s: _root(s["var_gain"]) / s["gain_prompts"])),
    # -- tier 5: a measured step
    Metric("rlvr/lr/bound", 5, "learning rate", "learning rate × measured break-even −2J′/J″ of the applied step: "
           "measured, not the certified bound of a theorem. Absent unless J′ > 0 and J″ < 0 by two standard errors",
           "[derived]", _when("step_slope", "step_curvature", "var_step_curvature", "step_rate", "steps")(_lr_bound)),
    Metric("rlvr/lr/ratio", 5, "1", "learning rate over rlvr/lr/bound: above 1 the step undoes itself", "[derived]",
           _when("step_slope", "step_curvature", "var_step_curvature", "step_rate", "steps")(_lr_ratio)),
)

OVERHEAD = {
    "rlvr/time/overhead_ms": "milliseconds that the last measured window cost on the slowest rank, this call so far "
                             "included (any tier)",
    "rlvr/time/overhead_share": "that time over the wall time until the next measured window (any tier)",
    "rlvr/time/windows": "windows from this measured one to the next (any tier)",
}
"""What a monitor says of itself; not smoothed."""


def metrics_of(sums: Sums) -> dict[str, float]:
    """The metrics that these sums know."""
    found = {metric.key: metric.value(sums) for metric in METRICS}
    return {key: float(value) for key, value in found.items() if value is not None and math.isfinite(value)}


def _cell(words: str) -> str:
    return words.replace("|", r"\|")  # or a table would take it for a border


def describe_metrics() -> str:
    """A Markdown table of all metrics."""
    lines = ["| key | tier | unit | meaning | source |", "|---|---|---|---|---|"]
    lines += [f"| `{m.key}` | {m.tier} | {m.unit} | {_cell(m.meaning)} | {m.source} |" for m in METRICS]
    lines += [f"| `{key}` | 0 | | {meaning} | measured |" for key, meaning in OVERHEAD.items()]
    return "\n".join(lines)
