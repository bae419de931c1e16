"""Profile every stage at one scale: all stages, and the same at half of each axis, take turns round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.gap import LEVELS
from rlvr_fast.profile import machine
from rlvr_fast.profile.report import Growth, ProfileReport, StageResult
from rlvr_fast.profile.shape import AXES, Shape
from rlvr_fast.profile.stages import Inputs, Stage, all_stages
from rlvr_fast.synthetic import whole

PILOT_FLOPS = 2e9  # of one product: tells a machine's speed in a fraction of a second
FEWEST_REPEATS = 2
# Of the time budget, what the planned products may take at the speed of a bare one. The rest is for what a stage takes
# beyond its products, for drawing inputs and for the machine's rates.
PLANNED_SHARE = 0.5

SHORTEST_SECONDS = 0.02  # quicker calls are repeated within a round until they take so long, 100 times at most
MOST_CALLS = 100

Progress = Callable[[int, int, str], None]


def profile(shape: Shape, *, parameters: int | None = None, softcap: float | None = None,
            levels: Sequence[str] = LEVELS, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
            backend: str = "auto", repeats: int = 5, seconds: float | None = None, trace: str | Path | None = None,
            progress: Progress | None = None) -> ProfileReport:
    """Measure time, rate and memory of every stage of gradient analysis on rollout-like synthetic data.

    Args:
        shape: the scale asked for.
        parameters: of the model, for the share of a training step; None leaves that out.
        softcap, backend: as in ``token_stats``.
        levels: of ``gradient_gap``.
        device, dtype: of the operands.
        repeats: timed calls per stage, >= 2; fewer, but at least 2, where the time budget asks for it.
        seconds: time budget, about; the shape is scaled down to fit it. None measures the shape as it is.
        trace: file for a Chrome/Perfetto trace of one more call of every stage.
        progress: told (rounds done, rounds in all, what is running).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    started = time.perf_counter()
    device = torch.device(device)
    if dtype not in check.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    whole("repeats", repeats, FEWEST_REPEATS)
    for level in levels:
        check.choice("levels", level, LEVELS)
    if softcap is not None:
        check.positive("softcap", softcap)
    if parameters is not None:
        whole("parameters", parameters)
    backend = backends.resolve(backend, device)
    tell = progress or (lambda done, total, text: None)
    stages = all_stages(tuple(dict.fromkeys(levels)), softcap, backend)

    measured = shape if seconds is None else _fit(shape, stages, check.positive("seconds", seconds), repeats, dtype,
                                                  device, tell)
    tell(0, 1, "drawing inputs")
    halves = {axis: half for axis in AXES if (half := measured.halved(axis)) is not None}
    variants = {"": measured} | halves
    inputs = {axis: Inputs.draw(variant, dtype, device, seed=index)
              for index, (axis, variant) in enumerate(variants.items())}
    batch = inputs[""].batch
    rates = machine.matrix_rate(batch.hidden, batch.weight), machine.copy_rate(device)

    calls = {(stage.name, axis): partial(stage.run, given) for stage in stages for axis, given in inputs.items()}
    first, second, memory = {}, {}, {}
    for key, call in calls.items():
        tell(0, 1, f"first call of {key[0]}")
        first[key] = machine.seconds_of(call, device)
        if key[1] == "":
            memory[key[0]] = machine.peak_extra_bytes(call, device)
        second[key] = machine.seconds_of(call, device)
    times_in_round = {key: min(max(int(SHORTEST_SECONDS / taken), 1), MOST_CALLS) for key, taken in second.items()}
    if seconds is not None:
        round_seconds = sum(taken * times_in_round[key] for key, taken in second.items())
        left = seconds - (time.perf_counter() - started)
        repeats = max(min(repeats, int(left / round_seconds)), FEWEST_REPEATS)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for done in range(repeats):
        for key, call in calls.items():
            tell(done, repeats, key[0])
            times[key].append(machine.seconds_of(call, device, times_in_round[key]))
    if trace is not None:
        tell(repeats, repeats, "trace")
        export_trace(trace, stages, inputs[""])
    tell(repeats, repeats, "done")

    results = tuple(
        StageResult(stage.name, median(times[stage.name, ""]), min(times[stage.name, ""]), max(times[stage.name, ""]),
                    first[stage.name, ""], stage.flops(measured), stage.bytes(measured, dtype.itemsize),
                    stage.flops(shape), stage.bytes(shape, dtype.itemsize), memory[stage.name])
        for stage in stages)
    growth = tuple(
        Growth(axis, stage.name, median(times[stage.name, axis]), median(times[stage.name, ""]),
               median(f / h for f, h in zip(times[stage.name, ""], times[stage.name, axis], strict=True)))
        for axis in halves for stage in stages)
    return ProfileReport(shape, measured, results, growth, *rates, parameters, softcap, machine.device_name(device),
                         str(device), str(dtype).removeprefix("torch."), backend, repeats, seconds,
                         time.perf_counter() - started)


def export_trace(path: str | Path, stages: Sequence[Stage], inputs: Inputs) -> None:
    """One call of every stage as a Chrome/Perfetto trace, each under its name."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU]
    if inputs.batch.hidden.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as recorded:
        for stage in stages:
            with record_function(stage.name):
                stage.run(inputs)
                machine.synchronize(inputs.batch.hidden.device)
    recorded.export_chrome_trace(str(path))


def _fit(shape: Shape, stages: Sequence[Stage], seconds: float, repeats: int, dtype: torch.dtype,
         device: torch.device, tell: Progress) -> Shape:
    """The largest shape whose planned calls fit the budget at the speed of a bare product on a small one."""
    tell(0, 1, "how fast is this machine?")
    pilot = shape.fitted(PILOT_FLOPS)
    batch = Inputs.draw(pilot, dtype, device).batch
    rate = machine.matrix_rate(batch.hidden, batch.weight)
    products = sum(stage.flops(shape) for stage in stages) / shape.product_flops
    calls = 1 + (2 + repeats) * (1 + 0.5 + 0.5 + 1)  # a round: in full, half N, half V, half G at the same N
    return shape.fitted(PLANNED_SHARE * seconds * rate / (calls * products))
