"""Gap norms of every level and method beside the gap over all parameters, prompt by prompt, on one set of rollouts."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import rlvr_fast as rf

from . import figure, sampled, truth
from .agreement import RESAMPLES, alignment, rank_correlation, ratio, spearman
from .provenance import provenance
from .sampled import Sampled
from .truth import Truth, cosines_of

LEVELS = ("logits", "hidden", "head")
SKETCH_SEEDS = (0, 1)


def run(output: Path, *, quick: bool, n_prompts: int, say: Callable[[str], None]) -> dict:
    """The report, also written to ``output`` as JSON and as a figure."""
    own = sampled.tiny(n_prompts) if quick else sampled.smollm2(output / "rollouts.json", n_prompts)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable):
        say(f"fidelity: {name}")
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    hidden = timed("hidden states", own.hidden)
    gaps = {level: timed(level, lambda level=level: rf.gradient_gap(hidden, own.lm_head.weight, own.rollouts,
                                                                    level=level)) for level in LEVELS}
    gaps["segmented"] = timed("segmented", lambda: model_gap(own, "segmented"))
    for seed in SKETCH_SEEDS:
        gaps[f"sketch, seed {seed}"] = timed(f"sketch, seed {seed}",
                                             lambda seed=seed: model_gap(own, "sketch", seed=seed))
    exact = timed("truth", lambda: truth.measure(own))
    report = report_of(own, gaps, exact) | {"seconds": seconds}
    (output / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
    figure.draw(report, output / "fidelity.png")
    return report


def model_gap(own: Sampled, method: str, seed: int = 0) -> rf.ModelGapResult:
    """From the backward of a policy-gradient loss with the group's mean as baseline, a prompt at a time."""
    own.model.zero_grad(set_to_none=True)
    rewards = own.rollouts.correct.float()
    with rf.ModelGap(own.model, own.rollouts, method, seed=seed) as probe:
        for (ids, mask), members in zip(own.batches(), own.rollouts.members, strict=True):
            advantages = rewards[list(members)] - rewards[list(members)].mean()
            (-(advantages[:, None] * own.logp(ids) * mask).sum()).backward()
    own.model.zero_grad(set_to_none=True)
    return probe.gap()


def report_of(own: Sampled, gaps: dict, exact: Truth) -> dict:
    whole = exact.estimate()
    target = whole.norm_sq.numpy()
    pairs = torch.ones_like(exact.cosines).triu(1).bool()
    methods = {}
    for name, gap in gaps.items():
        values = gap.norm_sq.numpy()
        entry = {"norm_sq": values.tolist(), "stderr": gap.stderr.tolist(),
                 "norm_sq_naive": gap.norm_sq_naive.tolist(),
                 "rank": rank_correlation(values, target), "ratio": ratio(values, target),
                 "alignment": float(np.mean([alignment(a, b) for a, b in zip(gap.gram, exact.gram, strict=True)]))}
        vector = getattr(gap, "measured", gap).vector
        if vector is not None:
            cosines = cosines_of(vector.double() @ vector.double().T)
            entry["cosines between prompts"] = {"values": cosines[pairs].tolist(),
                                                "rank": rank_of_pairs(cosines, exact.cosines)}
        if name not in LEVELS:
            entry["difference"] = _difference(values - target, whole.norm_sq_naive.numpy(), whole.stderr.numpy())
        methods[name] = entry
    baselines = {"mean response length": own.rollouts.lengths.double(),
                 "p (1 - p)": own.rollouts.correct.double()}
    for name, per_response in baselines.items():
        mean = np.array([float(per_response[list(members)].mean()) for members in own.rollouts.members])
        mean = mean * (1 - mean) if name == "p (1 - p)" else mean
        if np.ptp(mean) > 0:
            methods[name] = {"rank": rank_correlation(mean, target)}
    return {"provenance": provenance(), "source": own.source, "prompts": [prompt.question for prompt in own.prompts],
            "responses per prompt": len(own.prompts[0].completions), "length_norm": True,
            "parameters": sum(p.numel() for p in own.model.parameters()),
            "tied": "lm_head.weight" not in dict(own.model.named_parameters()),
            "correct": whole.n_correct.tolist(),
            "truth": {"norm_sq": target.tolist(), "stderr": whole.stderr.tolist(),
                      "norm_sq_naive": whole.norm_sq_naive.tolist(), "cosines between prompts":
                      exact.cosines[pairs].tolist()},
            "methods": methods, "layers": shares(exact, layer_of), "kinds": shares(exact, kind_of)}


def _difference(off: np.ndarray, naive: np.ndarray, stderr: np.ndarray) -> dict[str, float]:
    """Relative to the plug-in norm², because the unbiased one comes close to 0, and to the error of sampling."""
    relative, in_stderr = np.abs(off / naive), np.abs(off / stderr)
    return {"relative_max": float(relative.max()), "relative_rms": float(np.sqrt(np.mean(relative**2))),
            "in_stderr_max": float(in_stderr.max()), "in_stderr_median": float(np.median(in_stderr)),
            "within_stderr": float((in_stderr <= 1).mean())}


def rank_of_pairs(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Rank correlation over the pairs of prompts, with the 95 % interval of a bootstrap over prompts."""
    left, right = left.numpy(), right.numpy()
    n, generator, values = len(left), np.random.default_rng(0), []
    for _ in range(RESAMPLES // 4):
        picks = generator.integers(n, size=n)
        rows, columns = np.triu_indices(n, 1)
        first, second = picks[rows], picks[columns]
        keep = first != second  # a prompt with itself says nothing
        if keep.sum() > 1:
            values.append(spearman(left[first, second][keep], right[first, second][keep]))
    above = np.triu_indices(n, 1)
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return {"spearman": float(spearman(left[above], right[above])), "low": float(low), "high": float(high)}


def layer_of(name: str) -> str:
    number = re.search(r"\blayers\.(\d+)\.", name)
    if number:
        return f"layer {number[1]}"
    return "embedding, lm_head" if "embed" in name or "lm_head" in name else "final norm"


def kind_of(name: str) -> str:
    parts = name.split(".")[:-1]
    return "norms" if "norm" in parts[-1] else "embedding, lm_head" if parts[-1] in ("embed_tokens", "lm_head") else (
        parts[-1])


def shares(exact: Truth, group_of: Callable[[str], str]) -> dict[str, dict]:
    """Per group of parameters its share of the squared gap norm (they add up to it), and how it ranks prompts."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in exact.grams:
        groups[group_of(name)].append(name)
    whole, result = exact.estimate().norm_sq.numpy(), {}
    for group, names in groups.items():
        values = exact.estimate(names).norm_sq.numpy()
        p20, median, p80 = np.percentile(values / whole, (20, 50, 80))
        result[group] = {"share": float(values.sum() / whole.sum()), "p20": float(p20), "median": float(median),
                         "p80": float(p80), "rank": rank_correlation(values, whole)}
    return result


def lines_of(report: dict) -> list[str]:
    lines = [f"{len(report['prompts'])} prompts; rank correlation with the squared gap norm over all parameters"]
    for name, entry in report["methods"].items():
        rank = entry["rank"]
        line = f"  {name:22} {rank['spearman']:6.3f} (95 %: {rank['low']:.2f} to {rank['high']:.2f})"
        if "ratio" in entry:
            line += (f"  ratio {entry['ratio']['median']:.3g} ({entry['ratio']['p20']:.3g} to "
                     f"{entry['ratio']['p80']:.3g})  alignment {entry['alignment']:.3f}")
        if "difference" in entry:
            difference = entry["difference"]
            line += (f"  off by rms {difference['relative_rms']:.1e}, at most {difference['in_stderr_max']:.1e} stderr "
                     f"(median {difference['in_stderr_median']:.1e})")
        if "cosines between prompts" in entry:
            line += f"  cosines {entry['cosines between prompts']['rank']['spearman']:.3f}"
        lines.append(line)
    largest = sorted(report["layers"].items(), key=lambda item: -item[1]["share"])[:5]
    lines.append("largest shares: " + ", ".join(f"{name} {entry['share']:.1%}" for name, entry in largest))
    return lines


def rows_of(report: dict) -> list[dict]:
    """CSV rows with columns of bench/cpu/results.py."""
    common = {"kernel": "gap norm^2 against all parameters", "dtype": "float32", **report["provenance"],
              "shape": f"{len(report['prompts'])}x{report['responses per prompt']} responses, "
                       f"{report['parameters']} parameters"}
    rows = []
    for name, entry in report["methods"].items():
        rank = entry["rank"]
        rows.append(common | {"provider": name, "metric": "spearman over prompts", "median": rank["spearman"],
                              "note": f"95 % bootstrap over prompts {rank['low']:.3f} to {rank['high']:.3f}"})
        if "ratio" in entry:
            rows.append(common | {"provider": name, "metric": "ratio to all parameters",
                                  **{key: entry["ratio"][key] for key in ("p20", "median", "p80")}})
            rows.append(common | {"provider": name, "metric": "kernel alignment", "median": entry["alignment"]})
        if "difference" in entry:
            rows.append(common | {"provider": name, "metric": "relative difference, rms",
                                  "median": entry["difference"]["relative_rms"],
                                  "error": entry["difference"]["relative_max"], "error_of": "largest"})
    return rows
