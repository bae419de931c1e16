"""The relay's two experiments in their quick forms: what they exist to show, their files, and the command line."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import import_module

import pytest

from rlvr_fast.simulate.output import Report
from rlvr_fast.simulate.relay.experiment import ABRUPT, ALONE, NOT_ABELIAN, SMOOTH
from rlvr_fast.simulate.relay.runs import Condition, crossing, run_all, run_one, spread
from rlvr_fast.simulate.relay.training import Recipe


@cache
def report(name: str) -> Report:
    return import_module(f"rlvr_fast.simulate.{name}").run(quick=True, seeds=1)


def test_smooth_mixtures_relay_and_abrupt_ones_stay():
    conditions = report("relay").numbers["conditions"]
    for name in (SMOOTH, NOT_ABELIAN):
        levels = list(conditions[name]["levels"].values())
        woken = [level["visible"][0] for level in levels]
        assert woken == sorted(woken)
        assert woken[-1] < math.inf
        assert all(level["final_success"][0] > 0.9 for level in levels)
    for name in (ABRUPT, ALONE):
        hardest = list(conditions[name]["levels"].values())[-1]
        assert hardest["final_success"][0] == pytest.approx(1 / 32, abs=1e-3)
        assert hardest["visible"] == [math.inf]
    assert conditions[ABRUPT]["levels"][3]["final_success"][0] > 0.99  # while its easy level is mastered
    assert conditions[ABRUPT]["stalled_at"] < math.inf  # and the flow says that it cannot leave
    assert conditions[SMOOTH]["stalled_at"] == math.inf


def test_the_signal_is_the_easy_level_s_first_and_the_hard_one_s_last():
    run = report("relay").numbers["conditions"][NOT_ABELIAN]["runs"][0]
    signals = [row for row in run["signal"] if max(row) > 0]
    assert signals[0].index(max(signals[0])) == 0
    assert signals[-1].index(max(signals[-1])) == 2


def test_sampling_agrees_with_the_exact_figures():
    agreement = report("relay").numbers["agreement"]
    assert len(agreement["success"]) >= 10
    for name in ("success", "gap"):
        assert max(map(abs, agreement[name])) < 3.5
    assert set(agreement["length"]) == {3, 9, 27}


def test_plateaus_grow_with_the_ratio():
    numbers = report("relay.plateau").numbers
    rows = list(numbers["ratios"]["by_ratio"].values())
    for weight in ("0", "0.001"):
        lengths = [row[f"expected, entropy weight {weight}"] for row in rows]
        assert lengths == sorted(lengths)
        assert lengths[-1] > 4 * abs(lengths[0])
    table = numbers["sharpness"]["C_B = 4, entropy weight 0.001"]
    assert table["(5, 15, 45)"]["mastered"] < math.inf
    assert table["(5, 35)"]["visible"] == table["(45,)"]["visible"] == math.inf
    assert all(row["difference"] < 0.02 for row in numbers["margin"].values())


@pytest.mark.parametrize("name", ["relay", "relay.plateau"])
def test_report_is_written_with_its_provenance(name, tmp_path):
    picture, record = report(name).write(tmp_path / "new")
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(record.read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    assert content["parameters"]["quick"] is True
    assert content["parameters"]["seeds"] == [0]
    assert {"rlvr-fast", "torch", "numpy", "python"} <= content["versions"].keys()
    assert content["numbers"].keys() == report(name).numbers.keys()
    assert all(table.row_count for table in report(name).tables)


def test_runs_stop_when_there_is_enough_and_do_not_depend_on_processes():
    condition = Condition("Z_12", (2,), 60, 5, 0, (0.5,), 8, recipe=Recipe(20.0, 64))
    alone = run_one(condition, 3)
    assert alone["success"][-1][0] >= 0.5 > alone["success"][-2][0]
    assert alone["step"][-2] < crossing(alone, 0, 0.5) <= alone["step"][-1] < 60
    assert run_all([condition], [3, 4], processes=2) == [[alone, run_one(condition, 4)]]


def test_spread_counts_what_was_found():
    found = spread([1.0, 3.0, math.inf])
    assert (found["mean"], found["stderr"], found["finite"], found["of"]) == (2, pytest.approx(1), 2, 3)
    assert math.isnan(spread([math.inf])["mean"])


def test_crossing_is_between_measurements():
    history = {"step": [0.0, 10.0, 20.0], "success": [[0.1], [0.2], [0.6]]}
    assert crossing(history, 0, 0.3) == pytest.approx(12.5)
    assert crossing(history, 0, 0.05) == 0
    assert crossing(history, 0, 0.7) == math.inf


@pytest.mark.parametrize("name", ["relay", "plateau"])
def test_commands_are_there(name):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from rlvr_fast.simulate.commands import app

    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [name, "--output", "unused", "--seeds", "0"]).exit_code == 2
