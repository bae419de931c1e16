"""The measurement of what TRL's steps cost: whose turn it is, what is added, what a report says."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs TRL: pip install trl")

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench" / "trl"))

from guard_report import draw, markdown
from turns import Turn, take_turns

STEPS = 4


def work(name: str, path: Path):
    """A run that writes down when it computes, and needs 20 ms of CPU time a step."""
    def run(turn: Turn) -> str:
        for step in range(STEPS):
            turn.on_step_begin(None, None, None)
            with path.open("a") as file:
                file.write(f"{step} {name}\n")
            until = time.process_time() + 0.02
            while time.process_time() < until:
                pass
        turn.on_train_end(None, None, None)
        return f"result of {name}"

    return run


def test_runs_take_turns_and_every_round_begins_with_another(tmp_path):
    path, said = tmp_path / "order", []
    done = take_turns({name: work(name, path) for name in "abc"}, STEPS, said.append)
    assert path.read_text().split("\n")[:-1] == [
        f"{step} {name}" for step, names in enumerate(("abc", "bca", "cab", "abc")) for name in names]
    assert len(said) == STEPS
    for name, run in done.items():
        assert run.result == f"result of {name}"
        assert len(run.wall) == len(run.cpu) == STEPS
        assert all(seconds >= 0.02 for seconds in run.cpu)


def test_a_run_that_ends_early_is_named(tmp_path):
    def fails(turn: Turn) -> None:
        turn.on_step_begin(None, None, None)
        raise SystemExit

    with pytest.raises(RuntimeError, match="the run 'broken' ended early"):
        take_turns({"fine": work("fine", tmp_path / "order"), "broken": fails}, STEPS, print)


def test_what_is_added_is_the_mean_difference_of_paired_steps():
    overhead = pytest.importorskip("overhead", reason="needs TRL: pip install trl")
    plain = [1.0, 2.0, 3.0, 2.0]
    share, stderr = overhead.added([1.1, 2.1, 3.1, 2.1], plain)
    assert share == pytest.approx(0.05)
    assert stderr == pytest.approx(0.0, abs=1e-12)  # the steps differ among themselves, the pairs do not
    share, stderr = overhead.added([1.0, 2.2, 3.0, 2.2], plain)
    assert share == pytest.approx(0.05)
    assert stderr == pytest.approx((0.04 / 3) ** 0.5 / 2 / 2)


def test_measured_steps_are_compared_with_their_neighbours():
    overhead = pytest.importorskip("overhead", reason="needs TRL: pip install trl")
    drifting = [9.0, 1.0, 1.2, 1.2, 1.4, 1.4, 1.6, 1.6]  # each even step 0.1 above the mean of its neighbours
    share, stderr = overhead.among_neighbours(drifting)
    assert share == pytest.approx(0.1 / ((1.1 + 1.3 + 1.5) / 3))
    assert stderr == pytest.approx(0.0, abs=1e-12)


def step(before: float, after: float, **own: float) -> dict:
    return {"before": before, "after": after, "cpu": 0.1, "wall": 0.2, **own}


RUNS = [{"learning_rate": 1e-3, "mode": "plain", "seed": 0, "steps": [step(0.4, 0.2), step(0.2, 0.21)]},
        {"learning_rate": 1e-3, "mode": "scale", "seed": 0, "steps": [
            step(0.4, 0.42, scale=0.2, cost_share=0.0), step(0.42, 0.41, scale=0.3, cost_share=0.25)]}]


def test_the_table_has_a_row_for_each_rate_and_mode():
    plain, guarded = markdown(RUNS).splitlines()[2:]
    assert plain == "| 0.001 | plain TRL | 40% | 20% | 21% | 1 of 2 | 1 |  | 100 |"
    assert guarded == "| 0.001 | StepGuard, mode scale | 40% | 41% | 41% | 0 of 2 | 0.2 to 0.3 | 25% | 100 |"


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    draw(RUNS, tmp_path / "guard.png")
    assert (tmp_path / "guard.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
