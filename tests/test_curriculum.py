"""The curriculum example: its task and bookkeeping by themselves, and the whole script once."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from curriculum import policy, summary, task, training, verdicts  # noqa: E402
from curriculum.records import Runs  # noqa: E402
from curriculum.training import ARMS, QUICK, Data, Settings, next_mixture  # noqa: E402

END = task.END


def test_problems_of_a_level_are_distinct_and_held_out_apart():
    for level in task.LEVELS:
        training_problems, held_out = task.problems_of(level, torch.Generator().manual_seed(0))
        both = [tuple(pair) for pair in torch.cat([training_problems, held_out]).tolist()]
        assert len(set(both)) == len(both) == (100 if level == 1 else task.N_TRAINING + task.N_HELD_OUT)
        assert all(len(str(operand)) == level for pair in both for operand in pair)


def test_numbers_are_written_from_the_ones_upwards():
    problems = torch.tensor([[7, 90], [1234, 9999], [0, 0]])
    assert task.prompt_tokens(problems)[0].tolist() == [7, END, END, END, task.PLUS, 0, 9, END, END, task.EQUALS]
    answers, mask = task.answer_tokens(problems)
    assert answers.tolist() == [[7, 9, END, END, END, END], [3, 3, 2, 1, 1, END], [0, END, END, END, END, END]]
    assert mask.sum(1).tolist() == [3, 6, 2]
    assert task.verify(answers, problems).tolist() == [1, 1, 1]
    assert task.verify(answers.roll(1, 0), problems).tolist() == [0, 0, 0]


def test_the_decoder_is_the_model_one_token_at_a_time():
    torch.manual_seed(0)
    model, problems = policy.new_policy(), torch.tensor([[3, 4], [123, 45]])
    with torch.no_grad():
        decoder = policy.Decoder(model, task.prompt_tokens(problems), 3)
        sequences = torch.cat([task.prompt_tokens(problems), task.answer_tokens(problems)[0]], 1)
        sequences = sequences.repeat_interleave(3, 0)
        whole = model.lm_head(model(sequences))[:, task.PROMPT_LENGTH - 1:-1]
        found = [decoder.logits, *(decoder.advance(sequences[:, [task.PROMPT_LENGTH + i]]) for i in range(5))]
    assert torch.allclose(torch.stack(found, 1), whole, atol=1e-5)  # float32, logits of about 1


def test_samples_are_verified_and_agree_with_exact_success():
    torch.manual_seed(0)
    model, problems = policy.new_policy(), torch.tensor([[1, 2], [3, 4]])
    sequences, rollouts = policy.sample(model, problems, torch.tensor([17, 5]), 3000, torch.Generator().manual_seed(0))
    assert rollouts.prompt_ids == (17, 5)
    assert sequences.shape == (6000, task.PROMPT_LENGTH + task.MAX_ANSWER_LENGTH)
    exact = policy.exact_success(model, problems)
    assert abs(rollouts.correct.double().mean() - exact) < 4 * math.sqrt(exact / 6000)  # four standard errors


@pytest.mark.parametrize("measure", [False, True])
def test_a_step_raises_the_probability_of_what_was_right(measure):
    torch.manual_seed(0)
    data = Data.make(torch.Generator().manual_seed(0))
    model = policy.NextToken(policy.new_policy())
    policy.warm_up(model.policy, data.pools, data.held_out, 0.02, torch.Generator().manual_seed(0))
    settings = replace(QUICK, group_size=64)
    ids = torch.arange(8)
    before = policy.exact_success(model.policy, data.problems[ids])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rollouts, gap = training.update(model, optimizer, data, ids, settings, torch.Generator().manual_seed(1),
                                    measure=measure)
    assert 0 < rollouts.correct.double().mean() < 1
    assert policy.exact_success(model.policy, data.problems[ids]) > before
    assert (gap is not None) == measure
    if measure:
        assert gap.prompt_ids == tuple(range(8))
        assert set(gap.coverage.missing) == {"policy.position_embedding.weight"}  # taken as a slice, not called


def test_mixtures_of_the_arms():
    rates = {1: 0.9, 2: 0.5, 4: 0.0}
    assert next_mixture("uniform", rates, None, 0.1) == dict.fromkeys(task.LEVELS, 1.0)
    found = next_mixture("success", rates, None, 0.1)
    assert found == pytest.approx({1: 0.9 * 0.09 / 0.34 + 0.025, 2: 0.9 * 0.25 / 0.34 + 0.025, 3: 0.025, 4: 0.025})
    assert sum(next_mixture("success", {1: 1.0}, None, 0.1).values()) == pytest.approx(0.1)  # nothing but the floor

    def mixture(*, allocation, base, floor):
        return SimpleNamespace(as_dict=lambda: (allocation, tuple(base), floor))
    spectrum = SimpleNamespace(mixture=mixture)
    assert next_mixture("own gap", rates, spectrum, 0.1) == ("own", task.LEVELS, 0.1)
    assert next_mixture("shared gap", rates, spectrum, 0.1) == ("shared", task.LEVELS, 0.1)


def run_of(seed: int, arm: str, *curve: float) -> dict:
    records = [{"rollouts": 100 * i, "success": [rate, rate, 0.0, 0.0]} for i, rate in enumerate(curve)]
    return {"seed": seed, "arm": arm, "settings": {}, "records": records}


def test_estimates_have_the_interval_of_students_t():
    found = summary.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2, 3)
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(summary.estimate([1.0]).half_width)


def test_arms_are_compared_seed_by_seed():
    runs = [run_of(0, "uniform", 0.1, 0.2, 0.5), run_of(0, "shared gap", 0.1, 0.3, 0.7),
            run_of(1, "uniform", 0.5, 0.5, 0.5), run_of(1, "shared gap", 0.5, 0.6, 0.7), run_of(2, "uniform", 0, 0, 0)]
    row, over = summary.comparisons(runs)
    assert (row["arm"], row["against"], row["measure"], over["measure"]) == (
        "shared gap", "uniform", "final", "over the run")
    assert row["1"] == pytest.approx((0.2, 0.0, 2))
    assert row["3"] == pytest.approx((0.0, 0.0, 2))
    assert row["all"] == pytest.approx((0.1, 0.0, 2))
    assert over["1"].mean == pytest.approx(((0.35 - 0.25) + (0.6 - 0.5)) / 2)  # areas under the curves
    assert summary.sentence(row) == (
        "- shared gap, final: better than uniform (+10.0 ± 0.0 points over 2 seeds).")
    tie = summary.comparisons([run_of(s, arm, 0.1, 0.1 + s * 0.1 * arm.endswith("gap"))
                               for s in range(3) for arm in ("uniform", "shared gap")])[0]
    assert "not told from uniform" in summary.sentence(tie)
    worse = summary.comparisons([run_of(s, arm, 0.5, 0.3 if arm == "shared gap" else 0.4 + 0.001 * s)
                                 for s in range(3) for arm in ("uniform", "shared gap")])[0]
    assert "worse than uniform" in summary.sentence(worse)


def test_finished_runs_are_kept_and_only_those_with_the_same_settings(tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = Runs(path, Settings())
    runs.add(training.run_record(1, "uniform", Settings(), 5, [{"success": [math.nan]}]))
    runs.add(training.run_record(0, "uniform", Settings(), 5, []))
    path.write_text(path.read_text() + '{"seed": 3, "arm": "unif')  # cut off in the middle
    again = Runs(path, Settings())
    assert (0, "uniform") in again
    assert (0, "success") not in again
    assert (3, "uniform") not in again
    assert [run["seed"] for run in again.of([0, 1, 2])] == [0, 1]
    assert again.of([1])[0]["records"] == [{"success": [None]}]
    assert (0, "uniform") not in Runs(path, replace(Settings(), n_steps=5))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    output = tmp_path_factory.mktemp("curriculum")
    command = [sys.executable, str(EXAMPLES / "curriculum.py"), "--quick", "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300), output


def test_the_script_runs_and_compares(quick_run):
    done, output = quick_run
    assert done.returncode == 0, done.stderr
    for expected in ("seed 0: warm-up", "| arm | seeds |", "- shared gap, final", "points over 2 seeds"):
        assert expected in done.stdout
    assert (output / "curriculum.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_arms_of_a_seed_share_their_start_and_everything_is_written_down(quick_run):
    _, output = quick_run
    content = json.loads((output / "curriculum.json").read_text())
    runs = {(run["seed"], run["arm"]): run["records"] for run in content["runs"]}
    assert set(runs) == {(seed, arm) for seed in (0, 1) for arm in ARMS}
    for seed in (0, 1):
        assert len({tuple(runs[seed, arm][0]["success"]) for arm in ARMS}) == 1
        assert len({record["rollouts"] for arm in ARMS for record in runs[seed, arm]}) == 3  # the same budget
    for (_, arm), records in runs.items():
        assert [record["step"] for record in records] == [0, 2, 4]
        assert all(sum(record["mixture"]) == pytest.approx(1) for record in records[1:])
        assert all((record["spectrum"] is not None) == arm.endswith("gap") for record in records[1:])
    assert {row["arm"] for row in content["differences"]} == set(ARMS[1:])


def test_bad_arguments_are_refused(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("curriculum_script", EXAMPLES / "curriculum.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for arguments, message in ((["--seeds", "1"], "--seeds must be at least 2"),
                               (["--steps", "7"], "--steps must be a multiple of 5, got 7")):
        monkeypatch.setattr(sys, "argv", ["curriculum.py", *arguments])
        with pytest.raises(SystemExit):
            script.parse_arguments()
        assert message in capsys.readouterr().err


def test_verdicts_are_counted_where_the_truth_is_known():
    (lucky, learnable), bins = verdicts.measure(verdicts.Case(32, 1, 0.5), n_batches=1, n_prompts=6)
    assert [sum(one.values()) for one in bins] == [1, 1]
    assert sum(lucky.values()) == sum(learnable.values()) == 6
    assert learnable["edge"] >= 5
    assert lucky.get("edge", 0) <= 1
