"""What each provider adds to a training step: time in interleaved rounds, peak memory, the operators it goes to."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table

from rlvr_fast.bench import resident_memory

from . import peak_memory
from .language_model import SHAPES
from .provenance import provenance
from .providers import PROVIDERS, Provider
from .step import Step, response_logp

TARGETS = {"rlvr_fast segmented": 1.15, "rlvr_fast sketch": 1.05}  # times a plain step
RATIO = "times a plain step, CPU time"  # unlike the wall's it does not count what else the cores do
N_OPERATORS = 6
NAMES = tuple(provider.name for provider in PROVIDERS)


def measure(shape: str, rounds: int, *, names: list[str] | None, times_only: bool, memory: bool,
            say: Callable[[str], None]) -> list[dict]:
    """CSV rows of the providers (``names``, or all) on one shape, with columns of bench/cpu/results.py."""
    step = Step.draw(SHAPES[shape])
    common = {"kernel": "model gap in a training step", "shape": str(step.shape), "dtype": "float32", **provenance()}
    asked = [provider for provider in PROVIDERS if provider is PROVIDERS[0] or provider.name in (names or NAMES)]
    reasons = {provider.name: reason for provider in asked if (reason := provider.missing(step)) is not None}
    there = [provider for provider in asked if provider.name not in reasons]
    say(f"{shape}: {rounds} rounds of {len(there)} providers")
    seconds, answers = interleaved(step, there, rounds)
    floor, errors, operators, peaks = there[0].name, {}, {}, {}
    if not times_only:
        say(f"{shape}: float64 norms")
        truth = _float64_norms(step)
        errors = {name: float((found / truth - 1).abs().max()) for name, found in answers.items()}
        say(f"{shape}: operators")
        operators = {provider.name: _operators(step, provider) for provider in there if provider.profiled}
        peaks = _peaks(shape, there, say) if memory else {}
    rows = []
    for provider in asked:
        own = common | {"provider": provider.name, "error_of": "norm^2 of each response, largest relative error",
                        "note": provider.gives}
        if provider.name in reasons:
            rows.append(own | {"metric": "milliseconds", "note": reasons[provider.name]})
            continue
        taken = seconds[provider.name]
        own |= {"rounds": len(taken), "error": errors.get(provider.name, "")}
        rows.append(own | {"metric": "milliseconds"} | _spread([1e3 * wall for wall, _ in taken.values()]))
        for metric, which in (("times a plain step", 0), (RATIO, 1)):
            ratios = [t[which] / seconds[floor][turn][which] for turn, t in taken.items()]
            rows.append(own | {"metric": metric} | _spread(ratios))
        peak = peaks.get(provider.name)
        if isinstance(peak, float) and isinstance(peaks[floor], float):
            rows.append(own | {"metric": "peak MiB beyond a plain step", "median": peak - peaks[floor], "rounds": 1,
                               "extra_memory_share": (peak - peaks[floor]) / peaks[floor]})
        elif peak is not None:
            rows.append(own | {"metric": "peak MiB beyond a plain step", "note": str(peak)})
        for name, milliseconds in _largest_differences(operators.get(provider.name), operators.get(floor)):
            rows.append(own | {"metric": f"self ms beyond a plain step: {name}", "median": milliseconds, "rounds": 1})
    return rows


def interleaved(step: Step, providers: list[Provider], rounds: int
                ) -> tuple[dict[str, dict[int, tuple[float, float]]], dict[str, torch.Tensor]]:
    """(wall, CPU) seconds by provider and round, and the norms found.

    All take turns; the next round begins one provider later. CPU time is that of all threads together.
    """
    seconds, answers = {provider.name: {} for provider in providers}, {}
    providers[0].run(step)
    for turn in range(rounds):
        shift = turn % len(providers)
        for provider in providers[shift:] + providers[:shift]:
            if provider.rounds is not None and turn >= provider.rounds:
                continue
            step.clear()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            found = provider.run(step)
            seconds[provider.name][turn] = time.perf_counter() - wall, time.process_time() - cpu
            if found is not None:
                answers[provider.name] = found
    step.clear()
    return seconds, answers


def _float64_norms(step: Step) -> torch.Tensor:
    """‖∇ log π(o_i)‖² from a float64 backward per response."""
    double, norms = copy.deepcopy(step.model).double(), []
    for i in range(len(step.ids)):
        double.zero_grad(set_to_none=True)
        response_logp(double, step.ids[i:i + 1], step.shape.prompt_tokens).sum().backward()
        norms.append(sum(p.grad.square().sum() for p in double.parameters()))
    return torch.stack(norms)


def _operators(step: Step, provider: Provider) -> dict[str, float]:
    """Self time of every operator in one call, milliseconds."""
    step.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        provider.run(step)
    step.clear()
    return {entry.key: entry.self_cpu_time_total / 1e3 for entry in profile.key_averages()}


def _largest_differences(own: dict[str, float] | None, floor: dict[str, float] | None) -> list[tuple[str, float]]:
    if own is None or own is floor:
        return []
    differences = {name: value - floor.get(name, 0.0) for name, value in own.items()}
    return sorted(differences.items(), key=lambda item: -abs(item[1]))[:N_OPERATORS]


def _peaks(shape: str, providers: list[Provider], say: Callable[[str], None]) -> dict[str, float | str]:
    reason = resident_memory.unavailable()
    if reason is not None:
        return {provider.name: reason for provider in providers}
    say(f"{shape}: peak memory, a process per provider")
    places = [PROVIDERS.index(provider) for provider in providers]
    found = peak_memory.peak_mib(places, shape, torch.get_num_threads())
    return {provider.name: peak for provider, peak in zip(providers, found, strict=True)}


def _spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("p20", "median", "p80"), map(float, np.percentile(values, (20, 50, 80))), strict=True))


def table_of(rows: list[dict]) -> Table:
    """One line per provider."""
    table = Table(title=f"{rows[0]['shape']}, {rows[0]['dtype']}, {rows[0]['device']}, {rows[0]['threads']} threads")
    for name in ("provider", "ms", "p20 - p80", "x plain, CPU", "p20 - p80", "MiB beyond", "error", "rounds", "gives"):
        table.add_column(name, justify="left" if name in ("provider", "gives") else "right", no_wrap=name != "gives")
    for row in (row for row in rows if row["metric"] == "milliseconds"):
        if "median" not in row:
            table.add_row(row["provider"], "missing", *[""] * 6, row["note"])
            continue
        others = {other["metric"]: other for other in rows if other["provider"] == row["provider"]}
        ratio, peak = others[RATIO], others.get("peak MiB beyond a plain step", {})
        table.add_row(row["provider"], f"{row['median']:.4g}", f"{row['p20']:.4g} - {row['p80']:.4g}",
                      f"{ratio['median']:.3f}", f"{ratio['p20']:.3f} - {ratio['p80']:.3f}",
                      f"{peak['median']:.0f}" if "median" in peak else "",
                      f"{row['error']:.1e}" if row["error"] != "" else "", str(row["rounds"]), row["note"])
    return table


def target_lines(rows: list[dict]) -> list[str]:
    """Every target beside what was measured."""
    lines = []
    for row in rows:
        target = TARGETS.get(row["provider"])
        if target is not None and row["metric"] == RATIO:
            verdict = "met" if row["median"] <= target else "not met"
            lines.append(f"{row['shape']}, {row['provider']}: {row['median']:.3f} times a plain step's "
                         f"CPU time (target {target:.2f}): {verdict}")
    return lines
