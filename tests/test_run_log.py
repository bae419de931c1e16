"""RunLog: what it writes, that it survives, what it refuses."""

import json
import math

import pytest
import torch
from report_runs import gap_of, interference_of, spectrum_of

from rlvr_fast.run_log import MOST_PROMPTS, MOST_TOKENS, RunLog


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read(folder):
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line_of_plain_json_at_once(tmp_path):
    log = RunLog(tmp_path / "new" / "run")
    log.log(0, {"a": 0.5, "b": math.nan, "c": math.inf, "d": -math.inf, "e": True, "verdict": "safe", "f": None})
    assert read(log.folder) == [{"step": 0, "a": 0.5, "b": None, "c": "Infinity", "d": "-Infinity", "e": True,
                                 "verdict": "safe", "f": None}]
    log.log(1, {"t": torch.tensor(0.25), "n": torch.tensor([3.0]).numpy(), "i": torch.tensor(7)})
    assert read(log.folder)[1] == {"step": 1, "t": 0.25, "n": 3.0, "i": 7}


def test_a_run_is_continued_after_a_line_that_was_cut_off(tmp_path):
    RunLog(tmp_path).log(0, {"a": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a"')
    RunLog(tmp_path).log(1, {"a": 2})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 0, "a": 1}', '{"step": 1, "a"', '{"step": 1, "a": 2}']


@pytest.mark.parametrize(("step", "metrics", "error", "message"), [
    (-1, {}, ValueError, "step must be an int >= 0, got -1"),
    (1.0, {}, ValueError, "step must be an int"),
    (True, {}, ValueError, "step must be an int"),
    (0, [("a", 1)], TypeError, "metrics must be a mapping"),
    (0, {"step": 1}, ValueError, "names other than 'step'"),
    (0, {3: 1}, ValueError, "metrics must have names"),
    (0, {"a": torch.zeros(2)}, ValueError, "metric 'a' must be a single number, got a torch.float32 tensor"),
    (0, {"a": [1]}, TypeError, "metric 'a' must be a number or a text"),
])
def test_what_is_no_metric_is_refused_before_anything_is_written(tmp_path, step, metrics, error, message):
    log = RunLog(tmp_path)
    with pytest.raises(error, match=message):
        log.log(step, metrics)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_details_are_replaced_part_by_part_and_all_at_once(tmp_path, monkeypatch):
    log, gap = RunLog(tmp_path), gap_of([f"prompt {at}" for at in range(12)])
    log.detail(spectrum=spectrum_of(gap), tokens=gap, decode=lambda token: f"<{token}>")
    log.detail(interference=interference_of(gap))
    found = strict((tmp_path / "details.json").read_text())
    assert found.keys() == {"spectrum", "tokens", "interference"}
    assert [path.name for path in tmp_path.iterdir()] == ["details.json"]
    with pytest.raises(TypeError, match="spectrum must be a DifficultySpectrum, got 3"):
        log.detail(spectrum=3, interference=interference_of(gap))
    assert strict((tmp_path / "details.json").read_text()) == found


def test_details_hold_what_the_results_hold(tmp_path):
    log, gap = RunLog(tmp_path), gap_of([f"prompt {at}" for at in range(12)])
    spectrum, interference = spectrum_of(gap), interference_of(gap)
    log.detail(spectrum=spectrum, tokens=gap, interference=interference)
    found = strict((tmp_path / "details.json").read_text())
    assert [row["success"] for row in found["spectrum"]["bins"]] == spectrum.bins.success_rate.tolist()
    assert [row["verdict"] for row in found["spectrum"]["prompts"]] == list(spectrum.prompts.verdict)
    assert [row["prompt"] for row in found["spectrum"]["prompts"]] == list(gap.prompt_ids)
    cosine = torch.tensor([[math.nan if value is None else value for value in row]
                           for row in found["interference"]["cosine"]], dtype=torch.float64)
    assert torch.equal(cosine.nan_to_num(9), interference.cosine.nan_to_num(9))
    rows = found["tokens"]["rows"]
    mean = gap.vector[gap.defined].double().mean(0)
    assert len(rows) == 2 * MOST_TOKENS
    assert {row["id"]: row["score"] for row in rows} == {row["id"]: mean[row["id"]].item() for row in rows}
    assert (rows[0]["id"], rows[-1]["id"]) == (mean.argmax().item(), mean.argmin().item())
    error = gap.vector[gap.defined].double().std(0) / math.sqrt(found["tokens"]["n_prompts"])
    assert rows[0]["stderr"] == error[rows[0]["id"]].item()
    assert found["tokens"]["n_prompts"] == int(gap.defined.sum())


def test_of_many_prompts_those_with_the_largest_gaps_are_kept(tmp_path):
    gap = gap_of(list(range(MOST_PROMPTS + 30)), width=4)
    RunLog(tmp_path).detail(interference=interference_of(gap))
    found = strict((tmp_path / "details.json").read_text())["interference"]
    assert (len(found["prompts"]), found["n_prompts"]) == (MOST_PROMPTS, MOST_PROMPTS + 30)
    norm_sq = interference_of(gap).products.diagonal().nan_to_num(-math.inf)
    dropped = set(range(MOST_PROMPTS + 30)) - set(found["prompts"])
    assert max(norm_sq[at] for at in dropped) <= min(norm_sq[at] for at in found["prompts"])


def test_tokens_need_a_gap_over_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="tokens must be a gap at level 'logits' over the whole vocabulary, got level"):
        RunLog(tmp_path).detail(tokens=gap_of(["a", "b"], level="hidden"))
    with pytest.raises(TypeError, match="tokens must be a Gap"):
        RunLog(tmp_path).detail(tokens=[1])


def test_unreadable_details_are_replaced(tmp_path):
    (tmp_path / "details.json").write_text("{")
    RunLog(tmp_path).detail(tokens=gap_of(["a", "b", "c"]))
    assert strict((tmp_path / "details.json").read_text()).keys() == {"tokens"}
