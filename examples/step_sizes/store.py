"""The figures of all runs in one small JSON file: columns per run, three significant digits, five of success rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlvr_fast.strict_json import rounded
from step_sizes.records import Reading, Run, Slope, Step
from step_sizes.settings import RunSettings

VERDICTS = {"safe": "s", "near": "n", "overshoot": "x", "undetermined": "?"}
NAMES = {letter: verdict for verdict, letter in VERDICTS.items()}
OWN = ("n_totals", "learning_rate", "seed", "guard")  # settings that differ between the runs of a sweep


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    common = {name: value for name, value in asdict(runs[0].settings).items() if name not in OWN}
    lines = [json.dumps(_columns(run), separators=(",", ":"), allow_nan=False) for run in runs]
    path.write_text(f'{{"settings":{json.dumps(common)},\n"runs":[\n' + ",\n".join(lines) + "\n]}\n")


def read_runs(path: Path) -> list[Run]:
    content = json.loads(path.read_text())
    common = {name: tuple(value) if isinstance(value, list) else value for name, value in content["settings"].items()}
    return [_run(columns, common) for columns in content["runs"]]


def _columns(run: Run) -> dict:
    steps = run.steps
    columns = {**{name: getattr(run.settings, name) for name in OWN},
               "success": [_round(value, 5) for value in (run.start, *(step.after for step in steps))],
               "norm": _column(step.norm for step in steps)}
    if run.settings.guard != "off":
        return columns | {"metrics": [{name: _round(value, 3) for name, value in step.guard.items()} for step in steps]}
    return columns | {
        **{name: [_column(getattr(step, name)) for step in steps] for name in ("start", "end")},
        "gain": [_column((step.gain, step.gain_stderr)) for step in steps],
        "truth": {step.step: {f"{m:g}": _round(value, 5) for m, value in step.truth.items()}
                  for step in steps if step.truth},
        **{f"{name}_verdict": "".join(VERDICTS[getattr(step, name).verdict] for step in steps)
           for name in ("scan", "meter")},
        **{f"{name}_break_even": _column(getattr(step, name).break_even for step in steps)
           for name in ("scan", "meter")},
        "scan_reason": {step.step: step.scan_reason for step in steps
                        if step.scan_reason not in ("", "within error")}}


def _run(columns: dict, common: dict) -> Run:
    settings = RunSettings(**common, **{name: columns[name] for name in OWN})
    read = _step if settings.guard == "off" else _guarded_step
    steps = [read(columns, k, settings.rate_at(k)) for k in range(len(columns["norm"]))]
    return Run(settings, columns["success"][0], steps)


def _guarded_step(columns: dict, k: int, rate: float) -> Step:
    metrics = {name: float(value) for name, value in columns["metrics"][k].items()}
    return Step.guarded(k, rate, columns["norm"][k], *columns["success"][k:k + 2], metrics)


def _step(columns: dict, k: int, rate: float) -> Step:
    scan, meter = (Reading(NAMES[columns[f"{name}_verdict"][k]], float(columns[f"{name}_break_even"][k]))
                   for name in ("scan", "meter"))
    unsaid = "within error" if scan.verdict == "undetermined" else ""
    return Step(k, rate, columns["norm"][k], *columns["success"][k:k + 2],
                {float(m): value for m, value in columns["truth"].get(str(k), {}).items()},
                *(Slope(*map(float, columns[name][k])) for name in ("start", "end")), scan,
                columns["scan_reason"].get(str(k), unsaid), *map(float, columns["gain"][k]), meter, {})


def _column(values) -> list:
    return [_round(value, 3) for value in values]


def _round(value: float, digits: int) -> float | str:
    return rounded(float(value), digits)


def write_numbers(path: Path, numbers: dict) -> None:
    path.write_text(json.dumps(rounded(numbers, 4), indent=1, allow_nan=False) + "\n")
