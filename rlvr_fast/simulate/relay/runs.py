"""Many runs: one condition and several seeds, in as many processes as there is work for."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlvr_fast.simulate.output import plain
from rlvr_fast.simulate.relay.group import named
from rlvr_fast.simulate.relay.task import StateTracking
from rlvr_fast.simulate.relay.training import Recipe, train

PROCESSES = 2
History = dict[str, list[Any]]  # of a run: column -> per measurement a number, or a number per level


@dataclass(frozen=True)
class Condition:
    """What a run is given besides its seed: see ``StateTracking``, ``Recipe`` and ``train``."""

    group: str
    lengths: tuple[int, ...]
    n_steps: int
    measure_every: int
    n_measured: int = 512
    enough: tuple[float, ...] | None = None
    n_identifiers: int = 48
    c_b: float = 4.0
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def task(self) -> StateTracking:
        return StateTracking(named(self.group), self.n_identifiers, self.c_b)


def run_one(condition: Condition, seed: int) -> History:
    """``train``, as plain lists."""
    history = train(condition.task, condition.lengths, condition.recipe, condition.n_steps, seed=seed,
                    measure_every=condition.measure_every, n_measured=condition.n_measured, enough=condition.enough)
    return plain({name: values.double() for name, values in history.items()})


def run_all(conditions: Sequence[Condition], seeds: Sequence[int], *, n_shown: int | None = None,
            processes: int = PROCESSES) -> list[list[History]]:
    """[condition][seed]: what ``run_one`` returns; the numbers do not depend on ``processes``.

    ``n_shown``: responses per level and measurement of the first seed's run, if it is to be measured more closely.
    """
    jobs = [(replace(condition, n_measured=n_shown) if n_shown and seed == seeds[0] else condition, seed)
            for condition in conditions for seed in seeds]
    if processes == 1:
        results = [run_one(*job) for job in jobs]
    else:
        # fresh processes with one thread each: the tensors are too small to share among threads
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"),
                                 initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(run_one, *zip(*jobs, strict=True)))
    return [results[i:i + len(seeds)] for i in range(0, len(results), len(seeds))]


def crossing(history: History, level: int, success: float) -> float:
    """The step at which a level's exact success rate first reaches this, between measurements by a line; else inf."""
    steps, rates = history["step"], [row[level] for row in history["success"]]
    for i, rate in enumerate(rates):
        if rate >= success:
            if i == 0:
                return steps[0]
            return steps[i - 1] + (success - rates[i - 1]) / (rate - rates[i - 1]) * (steps[i] - steps[i - 1])
    return math.inf


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, sd and standard error over the finite values, and how many are finite."""
    finite = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    n = len(finite)
    return {"mean": float(finite.mean()) if n else math.nan, "sd": float(finite.std()) if n > 1 else math.nan,
            "stderr": float(finite.std()) / n ** 0.5 if n > 1 else math.nan, "finite": n, "of": len(values)}
