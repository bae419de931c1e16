"""Is the truth true? Break-evens interpolated between the sweep's few multiples against those on a fine grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from step_sizes.forecasts import break_even_between
from step_sizes.settings import RunSettings
from step_sizes.start import prepare
from step_sizes.training import train

PER_OCTAVE, N_STEPS = 6, 9


def check_grid(settings: Sequence[RunSettings], warm_directory: Path) -> dict:
    """Over the first steps of some runs: the ratio of the coarse to the fine break-even, where both are inside."""
    ratios = [coarse / fine for one in settings for coarse, fine in _of_run(one, warm_directory)
              if all(0 < value < math.inf for value in (coarse, fine))]
    return {"steps": len(ratios), "median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _of_run(settings: RunSettings, warm_directory: Path) -> Iterator[tuple[float, float]]:
    multiples = settings.true_multiples
    shortest, longest = (round(PER_OCTAVE * math.log2(multiples[end])) for end in (0, -1))
    fine = [2 ** (i / PER_OCTAVE) for i in range(shortest, longest + 1)]  # has the coarse ones among it
    dense = replace(settings, n_steps=N_STEPS, truth_every=1, true_multiples=tuple(m for m in fine if m != 1))
    for step in train(*prepare(settings, warm_directory), dense).steps:
        truth = step.truth | {1.0: step.after}
        coarse = {m: truth[m] for m in (*multiples, 1.0)}
        yield break_even_between(coarse, step.before), break_even_between(truth, step.before)
