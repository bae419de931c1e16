"""One suite on one shape: everybody's first call, memory and error, then all of them launch by launch."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from .clock import Clock, Spread, interleave
from .suite import Provider, Result, Suite, errors, repeatable
from .table import Case, Table

GB = 1e9


@dataclass(frozen=True)
class Prepared:
    """What is known of a provider before its time.

    Attributes:
        first_call: seconds, compiling included.
        extra_bytes: rise of the peak of allocated memory over one call, results included; None without a GPU.
        same: whether two calls gave the same bits.
        errors: by result name, the worst of the input sets.
    """

    first_call: float
    extra_bytes: int | None
    same: bool
    errors: dict[str, float]


def prepare(provider: Provider, input_sets: list[Any], truths: list[dict], device: torch.device) -> Prepared:
    """Compile, call twice on the first set, check on all."""
    start = time.perf_counter()
    first = provider.run(input_sets[0])
    _synchronize(device)
    first_call = time.perf_counter() - start
    before = _reset_peak(device)
    second = provider.run(input_sets[0])
    extra = None if before is None else torch.cuda.max_memory_allocated(device) - before
    same, worst = repeatable(first, second), errors(second, truths[0])
    del first, second
    for inputs, truth in zip(input_sets[1:], truths[1:], strict=True):
        found = errors(provider.run(inputs), truth)
        worst = {name: max(worst[name], found[name], key=_nan_is_worst) for name in worst}
    return Prepared(first_call, extra, same, worst)


def measure(suite: Suite, case: Case, input_sets: list[Any], table: Table, clock: Clock, device: torch.device,
            rounds: int) -> None:
    """Fill ``table`` with every provider of ``suite``: figures, or why there are none."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()  # a function is recompiled for a few shapes only, then it runs eagerly without a word
    truths = [suite.truth(inputs) for inputs in input_sets]
    ready: dict[Provider, Prepared] = {}
    for provider in suite.providers:
        try:
            if provider.missing is None:
                ready[provider] = prepare(provider, input_sets, truths, device)
        except Exception as error:  # a peer's failure is a finding, not the end of the run
            table.add(case, provider.name, "milliseconds", note=f"failed: {type(error).__name__}: {error}"[:300])
        else:
            if provider.missing is not None:
                table.add(case, provider.name, "milliseconds", note=provider.missing)
        _free(device)
    calls = {provider.name: _call(provider, input_sets) for provider in ready}
    try:
        times = interleave(clock, calls, rounds, len(input_sets))
    except Exception as error:  # what ran alone may not fit beside the others
        table.add(case, "all", "milliseconds", note=f"failed when interleaved: {type(error).__name__}: {error}"[:300])
    else:
        _write(suite, case, input_sets[0], ready, times, table)
    _free(device)


def _call(provider: Provider, input_sets: list[Any]):
    def call(index: int) -> Result:
        return provider.run(input_sets[index])
    return call


def _write(suite: Suite, case: Case, inputs: Any, ready: dict[Provider, Prepared], times: dict[str, list[float]],
           table: Table) -> None:
    floor, best = suite.providers[0], _best_peer(ready, times)
    scale = 1e-9  # per millisecond to tera per second
    for provider, known in ready.items():
        name, spread = provider.name, Spread.of(times[provider.name])
        error = next((known.errors[key] for key in known.errors), None)
        note = f"lacks {provider.lacks}" if provider.lacks else ""

        def add(metric: str, value: Spread | float | None, text: str = "", name=name) -> None:
            table.add(case, name, metric, value, note=text)

        table.add(case, name, "milliseconds", spread, error=error, note=note)
        work = suite.work(inputs) if provider.work is None else provider.work
        if work and (provider.role != "floor" or provider.work is not None):
            rate = spread.reciprocal(scale * work)
            add(suite.unit, rate)
            if floor in ready and provider is not floor:
                add("share of floor", _ratio(times[floor.name], times[name], work / floor.work))
        if suite.reference in times:
            add(f"x {suite.reference}", _ratio(times[name], times[suite.reference]))
        if provider.role != "floor":
            if best is not None:
                add("x best peer", _ratio(times[name], times[best]), f"best peer: {best}")
            add("extra GB", None if known.extra_bytes is None else known.extra_bytes / GB,
                "" if known.extra_bytes is not None else "no GPU, not measured")
            add("bitwise repeatable", float(known.same))
            for key, value in known.errors.items():
                add(f"error of {key}", value)
        add("first call seconds", known.first_call, "compiling included")


def _best_peer(ready: dict[Provider, Prepared], times: dict[str, list[float]]) -> str | None:
    """The peer of least median time, whatever it lacks."""
    peers = [provider.name for provider in ready if provider.role == "peer"]
    return min(peers, key=lambda name: Spread.of(times[name]).median, default=None)


def _ratio(numerators: list[float], denominators: list[float], factor: float = 1.0) -> Spread:
    """Of the calls of one round each, so that what slows a round down cancels."""
    return Spread.of([factor * a / b for a, b in zip(numerators, denominators, strict=True)])


def _nan_is_worst(error: float) -> tuple[bool, float]:
    return math.isnan(error), error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes allocated now, from where the peak is counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free(device: torch.device) -> None:
    """Give back what a provider leaves, so that the next has all of the memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
