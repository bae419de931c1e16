"""Which metric key feeds which figure: the one table between what loops log and what the report shows.

The first key of a role that a step has is taken, with the errors that belong to that very key. Keys are looked up
without the prefixes that trainers put in front (``PREFIXES``); nested objects are flattened with "/".
"""

from __future__ import annotations

from typing import NamedTuple

PREFIXES = ("train/", "forecast/")


class Key(NamedTuple):
    """A key and the keys of its standard error and interval, None where there are none."""

    value: str
    stderr: str | None = None
    low: str | None = None
    high: str | None = None


def _with_error(value: str) -> Key:
    return Key(value, f"{value}_stderr")


METER, SCAN, STEP, GUARD = "rlvr/step/meter/", "rlvr/step/scan/", "rlvr/step/", "rlvr/step/guard/"

ROLES: dict[str, tuple[Key, ...]] = {
    # Success rate of the sampled responses; "reward" is the mean of TRL and holds where rewards are 0 and 1.
    "success": (Key(METER + "success"), Key("rlvr/group/p_mean"), Key(SCAN + "success_before"),
                Key(STEP + "success_before"), _with_error("success"), Key("success_rate"), Key("training_success"),
                Key("reward")),
    "exact_success": (Key("exact_before"),),
    "gap": (_with_error("rlvr/gap/norm_sq"), _with_error("gap_norm_sq")),
    "gap_norm": (Key("rlvr/gap/norm", "rlvr/gap/stderr"),),
    "alignment": (Key("rlvr/gap/cos_update"),),
    "signal_to_noise": (Key("rlvr/signal_to_noise"), Key("signal_to_noise")),
    "break_even": (Key(METER + "break_even", None, METER + "break_even_low", METER + "break_even_high"),
                   Key(SCAN + "break_even"), _with_error(STEP + "success_break_even"), Key("break_even")),
    "fraction": (Key("rlvr/lr/ratio"), Key("fraction_of_break_even")),
    "learning_rate": (Key("learning_rate"), Key("lr"), Key("actor/lr")),
    "break_even_rate": (Key("rlvr/lr/bound"), Key(GUARD + "break_even_rate")),
    "gain": (_with_error(METER + "gain"), Key(SCAN + "success_gain/x1", SCAN + "success_gain_stderr/x1"),
             _with_error(STEP + "success_gain"), _with_error("predicted_success_gain"), _with_error("gain")),
    "realised_gain": (_with_error(METER + "realised_gain"), Key("realised_success_gain")),
    "verdict_code": (Key(METER + "verdict_code"),),
    "mixed": (Key("rlvr/group/frac_mixed"), Key("mixed_share"), Key("mixed")),
    "zero_std": (Key("frac_reward_zero_std"),),
    "solved": (Key("rlvr/group/frac_solved"), Key("solved")),
    "failed": (Key("rlvr/group/frac_failed"), Key("failed")),
    "length": (Key("rlvr/length/mean"), Key("completions/mean_length"), Key("response_length/mean"),
               Key("mean_length"), Key("length")),
    "length_bias": (Key("rlvr/length/bias_index"),),
    "length_difference": (Key("length_difference"),),
    "n_prompts": (Key(METER + "n_prompts"), Key("prompts")),
}
UNBOUNDED = ("break_even", "fraction", "break_even_rate")  # infinity says something: no break-even in sight, or at 0
STEP_KEYS = ("step", "global_step", "training/global_step", "_step", "iteration")
RUN_KEYS = ("run",)
VERDICT_KEYS = ("verdict", METER + "verdict", SCAN + "verdict")
REASON_KEYS = ("reason", METER + "reason")
BIN = METER + "bin_"  # rlvr/step/meter/bin_<low>_<high>/<figure>: the meter's reading by success rate
TEXTS = frozenset((*RUN_KEYS, *VERDICT_KEYS, *REASON_KEYS))
KNOWN = frozenset(name for keys in ROLES.values() for key in keys for name in key if name is not None) \
    | frozenset(STEP_KEYS) | TEXTS


def bare(key: str) -> str:
    """The key without a trainer's prefix."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def is_known(key: str) -> bool:
    return key in KNOWN or key.startswith(BIN)
