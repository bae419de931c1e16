"""The demo: its task, its bookkeeping and its summary by themselves, and the whole command."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlvr_fast.cli import app
from rlvr_fast.demo import task
from rlvr_fast.demo.model import Policy
from rlvr_fast.demo.records import Forecast, Run, StepRecord
from rlvr_fast.demo.sampling import completion_logp, exact_success, sample
from rlvr_fast.demo.summary import collapse_step, summarise


def test_the_right_answer_and_no_other_is_rewarded():
    problems = torch.tensor([[4, 5], [47, 8], [47, 85], [0, 0]])
    end = task.END
    right = torch.tensor([[9, end, end, end], [5, 5, end, end], [1, 3, 2, end], [0, end, end, end]])
    assert torch.equal(task.answer_tokens(problems)[0], right)
    assert task.verify(right, problems).tolist() == [1, 1, 1, 1]
    for wrong in ([8, end, end, end], [5, 5, 1, end], [1, 3, 2, 2], [end, end, end, end]):
        assert task.verify(torch.tensor([wrong] * 4), problems).tolist() == [0, 0, 0, 0]


def test_training_and_held_out_problems_are_disjoint():
    problems, held_out = task.split_problems(100, torch.Generator().manual_seed(0))
    everything = {tuple(pair) for pair in torch.cat([problems, held_out]).tolist()}
    assert (len(problems), len(held_out), len(everything)) == (9900, 100, 10000)


def test_exact_success_is_the_limit_of_sampled_success():
    """Also ties the sampler, the masks and the teacher-forced log-probs to each other."""
    torch.manual_seed(0)
    policy = Policy(task.VOCABULARY_SIZE, task.PROMPT_LENGTH + task.MAX_ANSWER_LENGTH, width=16, n_layers=1)
    problems = torch.tensor([[1, 2], [3, 4]])
    samples = sample(policy, problems, 3_000, torch.Generator().manual_seed(0))
    rate = samples.rollouts.correct.double().mean().item()
    exact = exact_success(policy, problems)
    assert abs(rate - exact) < 4 * math.sqrt(exact / 6_000)  # four standard errors
    logp = completion_logp(policy, samples).double()
    of_response = torch.segment_reduce(logp, "sum", lengths=samples.rollouts.lengths)
    right = [of_response[samples.rollouts.correct & (samples.rollouts.prompt_index == prompt)] for prompt in (0, 1)]
    # one right answer, so one probability, and it is the prompt's success rate
    assert all(torch.allclose(found, found[:1].expand_as(found), atol=1e-5) for found in right)
    assert sum(found[0].exp().item() for found in right) / 2 == pytest.approx(exact, rel=1e-4)


FORECAST = Forecast(
    learning_rate=1.0, mixed_share=1.0, gap_norm_sq=1.0, gap_norm_sq_stderr=0.1, alignment=0.1, alignment_stderr=0.01,
    success=0.4, predicted_success_gain=0.0, predicted_success_gain_stderr=0.01, predicted_log_odds_gain=0.0,
    predicted_log_odds_gain_stderr=0.04, break_even=1.0, fraction_of_break_even=1.0, effective_share=0.9,
    verdict="undetermined")


def run_of(rates: list[float], verdicts: list[str]) -> Run:
    records = [StepRecord("made up", step, replace(FORECAST, verdict=verdict), before, after)
               for step, (verdict, (before, after)) in enumerate(zip(verdicts, pairwise(rates), strict=True))]
    return Run("made up", 1.0, rates[0], records)


def test_the_summary_says_what_happened_and_what_did_not():
    climb = run_of([0.4, 0.5, 0.6], ["safe", "near"])
    announced = run_of([0.4, 0.3, 0.1], ["overshoot", "undetermined"])
    silent = run_of([0.4, 0.3, 0.1], ["undetermined", "undetermined"])
    assert (collapse_step(climb), collapse_step(announced)) == (None, 1)
    assert "climbed from 40.0% to 60.0%" in summarise(climb, announced)[0]
    told = summarise(climb, announced)[1]
    assert "announced before step 0" in told
    assert "cost 30.0 points in all, 1 step was called an overshoot, applied all the same, and lost 10.0 points" in told
    assert "was not announced" in summarise(climb, silent)[1]
    assert "no collapse" in summarise(climb, climb)[1]
    assert "fell from" in summarise(announced, climb)[0]
    assert "1 step called an overshoot, 1 lost success; of 2 steps called safe or near, 2 gained" in \
        summarise(climb, announced)[2]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "rlvr_fast", "demo", "--quick", "--steps", "2", "--seed", "3", "--output",
               str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300), output


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


def test_the_command_runs_and_reports(quick_run):
    done, _ = quick_run
    assert done.returncode == 0, done.stderr
    for expected in ("warm-up", "verdict", "realised", "What this showed"):
        assert expected in done.stdout
    assert done.stderr == ""


def test_every_step_is_written_down(quick_run):
    _, output = quick_run
    rows = rows_of(output)
    assert [(row["run"], row["step"]) for row in rows] == [
        ("safe", 0), ("safe", 1), ("large", 0), ("large", 1), ("large", 2)]
    may_be_null = {"break_even", "predicted_log_odds_gain", "predicted_log_odds_gain_stderr"}
    for row in rows:
        assert row["verdict"] in ("safe", "near", "overshoot", "undetermined")
        numbers = {name: value for name, value in row.items() if name not in ("run", "verdict", "reason")}
        assert bool(row["reason"]) == (row["verdict"] == "undetermined")
        assert {name for name, value in numbers.items() if value is None} <= may_be_null
        assert 0 < row["exact_before"] < 1
        assert 0 < row["exact_after"] < 1
        assert 0 < row["effective_share"] <= 1
        assert row["realised_success_gain"] == pytest.approx(row["exact_after"] - row["exact_before"])
    assert rows[0]["exact_before"] == rows[2]["exact_before"]  # both runs start from one warm-started model
    assert rows[1]["exact_before"] == rows[0]["exact_after"]


def test_the_figure_is_written(quick_run):
    _, output = quick_run
    assert (output / "grpo_arithmetic.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json_says_what_the_files_say_whatever_the_number_of_threads(quick_run, tmp_path):
    """In this process, whose number of threads is left as it was; the first run had one of its own."""
    _, output = quick_run
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, ["demo", "--quick", "--steps", "2", "--seed", "3", "-o", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert torch.get_num_threads() == threads
    content = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["seed"] == 3
    assert [row for run in content["runs"] for row in run["steps"]] == rows_of(output) == rows_of(tmp_path)
    assert [run["success_at_end"] for run in content["runs"]] == [rows_of(output)[at]["exact_after"] for at in (1, 4)]
    assert content["files"] == {"steps": str(tmp_path / "steps.jsonl"), "figure": str(tmp_path / "grpo_arithmetic.png")}
    assert all(sentence.endswith(".") for sentence in content["summary"])


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seed", "-1"], ["--seed", "x"]])
def test_bad_arguments_are_refused(arguments, tmp_path):
    done = CliRunner().invoke(app, ["demo", "--quick", "-o", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert arguments[0] in done.stderr
    assert not (tmp_path / "out").exists()
