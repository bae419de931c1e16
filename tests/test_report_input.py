"""The report of a run: what is read, what is escaped, what is refused and in which words."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from report_pages import Page, lines
from report_runs import HOSTILE, full_run, meter_metrics, write_rollouts
from typer.testing import CliRunner

import rlvr_fast as rf
from rlvr_fast.cli import app
from rlvr_fast.monitor.metrics import METRICS
from rlvr_fast.report import keys, write_report
from rlvr_fast.report.load import load
from rlvr_fast.run_log import RunLog
from rlvr_fast.step.reading import StepReading

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


# -- what is read -----------------------------------------------------------------------------------------------------


def test_every_key_of_the_table_is_one_that_the_library_writes():
    rollouts = rf.Rollouts.from_packed(torch.zeros(8, dtype=torch.int64), torch.arange(9),
                                       torch.tensor([0., 1, 0, 1, 1, 1, 0, 0]), torch.arange(2).repeat_interleave(4))
    logp = torch.full((8,), -2.0, dtype=torch.float64)
    weight = torch.nn.Parameter(logp.clone())
    curve = rf.scan_step(lambda: weight.double(), [weight], [torch.randn(8, dtype=torch.float64) / 9], rollouts,
                         multiples=(1, 2))
    written = {metric.key for metric in METRICS} | curve.summary().keys()
    written |= rf.measure_step(logp, logp + 0.01 * torch.randn(8).double(), rollouts).summary().keys()
    written |= {f"{keys.METER}{field.name}" for field in dataclasses.fields(StepReading)}
    written |= {f"{keys.METER}verdict_code", f"{keys.SCAN}verdict", f"{keys.GUARD}break_even_rate"}
    assert {key for key in keys.KNOWN if key.startswith("rlvr/")} <= written


def test_a_trainer_state_says_the_same_as_lines(tmp_path, report):
    rows = [{"step": step, "rlvr/lr/ratio": 0.3 + step, "rlvr/group/p_mean": 0.5} for step in range(4)]
    flat = load(lines(tmp_path / "steps.jsonl", rows)).series[0]
    for last, history in ((2, rows[:2]), (10, rows)):
        folder = tmp_path / "run" / f"checkpoint-{last}"
        folder.mkdir(parents=True)
        history = [{f"train/{key}" if "/" in key else key: value for key, value in row.items()} for row in history]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": last}))
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint-10" / "trainer_state.json"):
        found, = load(source).series
        assert found.step.tolist() == flat.step.tolist()
        assert {role: column.value.tolist() for role, column in found.columns.items()} \
            == {role: column.value.tolist() for role, column in flat.columns.items()}


def test_a_cut_off_last_line_and_repeated_steps_are_said_and_survived(tmp_path, report):
    path = lines(tmp_path / "metrics.jsonl", [{"step": 0, "rlvr/lr/ratio": 9.0}, {"step": 0, "rlvr/lr/ratio": 0.1},
                                              {"rlvr/lr/ratio": 0.1, "step": 2.5}, {"step": 1, "loss": 3.0}])
    path.write_text(path.read_text() + '{"step": 2, "rlvr/lr')
    page = report(path)
    assert "The last line of metrics.jsonl is cut off and left out." in page.text
    assert "1 rows repeat a step" in page.text
    assert "1 of 4 rows have a step that is no whole number" in page.text
    assert "loss 1 3 3 3 3" in page.text
    assert "ignored" not in page.text
    assert "None of 1 measured steps overshot." in page.text


def test_mixed_schemas_and_what_is_no_number_are_said(tmp_path, report):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0, "rlvr/group/p_mean": 0.5, "rlvr/gap/norm_sq": NaN}\n'
                    '{"step": 1, "train/training_success": 0.25, "rlvr/gap/norm_sq": Infinity}\n'
                    '{"step": 2, "rlvr/group/p_mean": [1], "forecast": {"gap_norm_sq": 3.0}, "rlvr/lr/ratio": 1e999}\n')
    page = report(path)
    assert "success comes from several keys, which may not be comparable: rlvr/group/p_mean (1 steps), " \
           "training_success (1 steps)" in page.text
    assert "rlvr/group/p_mean is no finite number in 1 steps." in page.text
    assert "rlvr/gap/norm_sq is no finite number in 1 steps." in page.text
    assert page.figures["gap"]["data"][-1]["y"] == [3.0]


def test_a_reward_that_is_no_success_rate_is_not_shown_as_one(tmp_path, report):
    rows = [{"step": step, "reward": step - 1.0, "rlvr/lr/ratio": 0.2} for step in range(5)]
    page = report(lines(tmp_path / "steps.jsonl", rows))
    assert "success" not in page.sections
    assert "reward is not between 0 and 1 and therefore no success rate." in page.text


def test_a_rollout_dump_alone_makes_a_page_and_joins_the_steps_beside_it(tmp_path, report):
    write_rollouts(tmp_path / "rollouts.jsonl", ["a", "b", "c"])
    page = report(tmp_path)
    assert {"success", "groups", "spectrum", "length", "prompts"} <= set(page.sections)
    assert "36 rollouts to 3 prompts" in page.text
    lines(tmp_path / "steps.jsonl", [{"step": step, "rlvr/group/p_mean": 0.125} for step in range(2)])
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 2, "rlvr/lr/ratio": 0.5}\n')
    joined = load(tmp_path).series[0]
    assert np.nan_to_num(joined.get("success").value, nan=9).tolist() == [0.125, 0.125, 9]  # not the dump's
    assert joined.get("length").value.tolist() == [11.5, 12.5, 13.5]


def test_of_several_dumps_the_first_is_read_and_a_dump_itself_is_no_log(tmp_path, report):
    write_rollouts(tmp_path / "rollouts-10.jsonl", ["a"])
    write_rollouts(tmp_path / "rollouts-2.jsonl", ["a", "b"])
    page = report(tmp_path)
    assert "24 rollouts to 2 prompts" in page.text
    assert "Rollouts are from rollouts-2.jsonl alone; 1 more of them lie beside it." in page.text
    page = report(tmp_path / "rollouts-10.jsonl")
    assert "12 rollouts to 1 prompts" in page.text
    assert "repeat a step" not in page.text


def test_rollouts_may_lie_elsewhere_and_need_a_threshold(tmp_path):
    lines(tmp_path / "steps.jsonl", [{"step": 0, "rlvr/lr/ratio": 0.5}])
    dump = lines(tmp_path / "other.jsonl", [{"question": "q", "points": value, "step": 0} for value in (0.2, 0.9)])
    command = ["report", str(tmp_path / "steps.jsonl"), "-o", str(tmp_path / "page.html"), "--rollouts", str(dump),
               "--reward", "points"]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "--threshold" in refused.output) == (2, True)
    assert CliRunner().invoke(app, [*command, "--threshold", "0.5"]).exit_code == 0
    assert "prompts" in Page(tmp_path / "page.html").sections


# -- what is escaped --------------------------------------------------------------------------------------------------


def test_hostile_names_are_shown_and_do_nothing(tmp_path, report):
    full_run(tmp_path, prompt_ids=[*HOSTILE, "ok"], decode=lambda token: HOSTILE[token % len(HOSTILE)])
    for run in HOSTILE:
        RunLog(tmp_path).log(50, {"run": run, "verdict": "undetermined", "reason": run, run: 1.0,
                                  "rlvr/group/p_mean": 0.5})
    page = report(tmp_path, title=HOSTILE[1])
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert {tag for tag, _ in page.tags} == {
        "html", "head", "meta", "title", "style", "noscript", "body", "header", "h1", "p", "main", "div", "section",
        "svg", "rect", "span", "i", "ul", "li", "h2", "details", "summary", "table", "thead", "tr", "th", "tbody", "td",
        "footer", "script", *(["dl", "dt", "dd"] if "missing" in page.sections else [])}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for name in HOSTILE[:3]:
        assert name in page.text
    assert "<" not in page.scripts[1]
    labels = json.dumps([figure["data"] for figure in page.figures.values()])
    assert "<script" not in labels
    assert "&lt;script&gt;" in labels


# -- what is refused --------------------------------------------------------------------------------------------------


BESIDE = ("details.json", "rollouts.jsonl")  # read beside a run, never as one
UNREADABLE = [
    ("steps.jsonl", "", "no steps in it yet"),
    ("steps.jsonl", "\n\n", "no steps in it yet"),
    ("steps.jsonl", "{\n", "line 1: no JSON"),
    ("steps.jsonl", '{"step": 1,, }\n{"step": 2}\n', "line 1: no JSON"),
    ("steps.jsonl", "[1]\n", "line 1: must be a JSON object, got [1]"),
    ("steps.jsonl", '{"step": 1, "loss": 2.0}\n', "none of its keys is known to the report. It has: loss"),
    ("steps.jsonl", b"\xff\xfe{}\n", "not UTF-8"),
    ("steps.jsonl.gz", b"\x1f\x8bnot gzip", "not a whole gzip file"),
    ("steps.jsonl", "[" * 100_000 + "\n", "line 1: no JSON"),
    ("trainer_state.json", '{"log_history": [', "no JSON, or cut off"),
    ("trainer_state.json", '{"steps": []}', "'log_history'"),
    ("trainer_state.json", '{"log_history": []}', "no steps in it yet"),
    ("details.json", "{", "no JSON, or cut off"),
    ("details.json", "[]", "must hold a JSON object"),
    ("details.json", '{"tokens": {"rows": [{}], "n_prompts": 1}}', "not as rf.RunLog writes it: tokens"),
    ("details.json", '{"interference": {"prompts": ["a"], "cosine": [[1, 2]]}}', "writes it: interference"),
    ("details.json", '{"spectrum": 7}', "writes it: spectrum"),
    ("rollouts.jsonl", '{"prompt": "a"}\n', "--reward"),
    ("steps.csv", "step,loss", "must be a folder, a trainer_state.json"),
    ("notes.txt", "", "must be a folder"),
]


@pytest.mark.parametrize(("name", "content", "message", "whole_folder"), [
    (name, content, "holds none of metrics.jsonl" if whole and name in ("steps.csv", "notes.txt") else message, whole)
    for name, content, message in UNREADABLE for whole in ((True,) if name in BESIDE else (True, False))])
def test_a_run_that_cannot_be_read_is_refused_in_plain_words(tmp_path, name, content, message, whole_folder):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused = CliRunner().invoke(app, ["report", str(folder if whole_folder else folder / name), "-o",
                                       str(tmp_path / "page.html")])
    assert refused.exit_code == 2, refused.output
    assert message in refused.output
    assert "Traceback" not in refused.output
    assert not (tmp_path / "page.html").exists()


def test_a_run_or_an_output_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "page.html")
    RunLog(tmp_path).log(0, meter_metrics(0))
    with pytest.raises(ValueError, match="output must be a file in a folder that exists"):
        write_report(tmp_path, tmp_path / "no" / "page.html")
    with pytest.raises(ValueError, match="output must be a file"):
        write_report(tmp_path, tmp_path)
