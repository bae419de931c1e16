"""The report of a run: what the page says, and the verdicts at its top."""

import math
import re
from collections import Counter

import pytest
import torch
from report_pages import lines
from report_runs import full_run, gap_of, interference_of, meter_metrics

from rlvr_fast.report import write_report
from rlvr_fast.report.breakdown import prompts_section
from rlvr_fast.report.load import Recorded, load
from rlvr_fast.report.page import MISSING
from rlvr_fast.report.section import POINTS, thin
from rlvr_fast.report.verdicts import headline, judge
from rlvr_fast.run_log import RunLog

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


# -- what the page says -----------------------------------------------------------------------------------------------


def test_a_full_run_has_every_section_and_fetches_nothing(tmp_path, report):
    full_run(tmp_path)
    page = report(tmp_path)
    assert page.sections == [*MISSING, "others"]
    assert "Not in this report" not in page.text
    assert set(page.figures) == set(MISSING) - {"prompts"}
    assert not [attributes for _, attributes in page.tags if {"src", "href", "srcset"} & attributes.keys()]
    policy, = (attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert [tag for tag, _ in page.tags].count("script") == 3


def test_the_headline_says_whether_since_when_and_for_whom(tmp_path, report):
    full_run(tmp_path)
    text = report(tmp_path).text
    assert "Overshoot The last step went past its break-even" in text
    assert "Overshoot since step 35 (5 in a row); undetermined before." in text  # 4 e^(−35/20) · 1.4 < 1
    assert "5 of 40 measured steps overshot, the first one at step 35." in text
    assert "The last step was 1.8 times its break-even" in text  # e^(39/20) / 4
    assert "scale the learning rate by about 0.28" in text
    assert "going on would help those with success 0 to 0.2, 0.2 to 0.4;" in text
    assert "those with 0.6 to 0.8, 0.8 to 1 are past their peak (step 39)" in text


def test_numbers_are_there_without_javascript(tmp_path, report):
    rows = [{"step": step, "rlvr/group/p_mean": 0.25 + step / 8, "rlvr/gap/norm_sq": 0.5,
             "rlvr/gap/norm_sq_stderr": 0.125} for step in range(3)]
    page = report(lines(tmp_path / "steps.jsonl", rows))
    assert "step success 0 0.250 1 0.375 2 0.500" in page.text
    assert "0.5 ± 0.12" in page.text
    assert all("open" in attributes for tag, attributes in page.tags if tag == "details")


@pytest.mark.parametrize(("key", "section"), [
    ("rlvr/lr/ratio", "step"), ("rlvr/group/p_mean", "success"), ("rlvr/step/success_gain", "gain"),
    ("rlvr/gap/norm", "gap"), ("rlvr/gap/cos_update", "alignment"), ("rlvr/signal_to_noise", "alignment"),
    ("rlvr/group/frac_mixed", "groups"), ("rlvr/length/mean", "length")])
def test_a_section_without_data_says_what_to_log(tmp_path, report, key, section):
    page = report(lines(tmp_path / "steps.jsonl", [{"step": step, key: 0.5} for step in range(3)]))
    assert page.sections[0] == section
    assert [one for one in page.sections if one != "missing"] == [section]
    for name, (title, advice) in MISSING.items():
        assert (f"{title} To get it: {advice}." in page.text) == (name != section)


def test_numbers_without_a_figure_are_listed_run_by_run(tmp_path, report):
    rows = [{"run": run, "step": step, "success": 0.5, "train/grad_norm": 2.0 * step - run, "note": "text",
             "flag": True, "odd": float("nan"), "nested": {"rate": 1e-5}} for run in (0, 1) for step in range(4)]
    page = report(lines(tmp_path / "steps.jsonl", rows))
    assert "0 grad_norm 4 0 6 0 6 " in page.text
    assert "1 grad_norm 4 −1 5 −1 5 " in page.text
    assert "0 nested/rate 4 1e−05 1e−05 1e−05 1e−05 " in page.text
    assert "3 keys ignored: note (8), flag (8), odd (8)." in page.text


def test_one_step_makes_a_page(tmp_path, report):
    RunLog(tmp_path).log(0, meter_metrics(0))
    page = report(tmp_path)
    assert "Safe since step 0, the first measured one (1 in a row)." in page.text
    assert {"step", "success", "gap", "whom"} <= set(page.sections)
    assert page.figures["gap"]["data"][-1]["error_y"]["array"] == [pytest.approx(1.96 * 0.03)]


def test_ten_thousand_steps_are_thinned_and_their_extremes_kept(tmp_path, report):
    rows = [{"step": step, "rlvr/lr/ratio": 0.3, "rlvr/gap/norm_sq": 1.0, "rlvr/gap/norm_sq_stderr": 0.1}
            for step in range(10_000)]
    rows[6543] |= {"rlvr/lr/ratio": 7.0, "rlvr/gap/norm_sq": 9.0}
    page = report(lines(tmp_path / "steps.jsonl", rows))
    for figure in page.figures.values():
        assert all(len(trace["x"]) <= 2 * POINTS for trace in figure["data"])
    line = page.figures["gap"]["data"][1]
    assert (max(line["y"]), line["x"][line["y"].index(9.0)], line["x"][0], line["x"][-1]) == (9.0, 6543, 0, 9999)
    assert re.search(r"Drawn: [\d,]+ of 10,000 steps, the lowest and the highest of every stretch", page.text)
    assert "40 of 10,000 rows, evenly spread." in page.text
    assert "1 of 10,000 measured steps overshot, the first one at step 6543." in page.text
    cells = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [cell["style"] for cell in cells].count("fill: var(--red)") == 1
    assert "each bar: the worst of several steps" in page.text


def test_thinning_keeps_the_extremes_of_every_stretch():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).numpy()
    picked = thin(values)
    assert len(picked) <= POINTS
    assert {0, 4999, int(values.argmin()), int(values.argmax())} <= set(picked.tolist())
    assert thin(values[:POINTS]).tolist() == list(range(POINTS))


def test_a_hundred_thousand_rows_make_a_page(tmp_path):
    path = lines(tmp_path / "steps.jsonl", ({"step": step, "rlvr/lr/ratio": 0.2, "rlvr/group/p_mean": step / 1e5}
                                            for step in range(100_000)))
    assert write_report(path, tmp_path / "page.html").stat().st_size < 6e6


def test_several_runs_of_one_file_are_told_apart(tmp_path, report):
    rows = [{"run": run, "step": step, "verdict": verdict, "exact_before": success(step)}
            for run, verdict, success in (("small", "safe", lambda step: 0.5 + step / 100),
                                          ("large", "undetermined", lambda step: 0.5 * 0.7 ** step))
            for step in range(12)]
    page = report(lines(tmp_path / "steps.jsonl", rows))
    assert "Run small Safe" in page.text
    assert "Run large Collapsed Success has collapsed: 1.5% now, 36.5% around step 2." in page.text
    assert [trace["name"] for trace in page.figures["success"]["data"]] == ["run small", "run large"]


@pytest.mark.parametrize(("last", "word"), [(0.35, "safe"), (0.29, "collapsed")])
def test_below_half_of_the_best_a_run_has_collapsed(tmp_path, last, word):
    rows = [{"step": step, "verdict": "safe", "exact_before": value}
            for step, value in enumerate([0.2, 0.6, 0.6, 0.6, last, last, last])]
    assert headline(load(lines(tmp_path / "steps.jsonl", rows)).series[0]).word == word


def test_the_heat_map_names_the_prompts_that_its_cells_are_about(tmp_path, report):
    gap = gap_of([f"prompt {at}" for at in range(24)])
    RunLog(tmp_path).detail(interference=interference_of(gap))
    page = report(tmp_path)
    trace, = page.figures["interference"]["data"]
    labels = page.figures["interference"]["layout"]["xaxis"]["ticktext"]
    assert page.figures["interference"]["layout"]["yaxis"]["ticktext"] == labels
    at = [gap.prompt_ids.index(label) for label in labels]
    assert len(at) >= 4
    torch.testing.assert_close(torch.tensor(trace["z"], dtype=torch.float64), interference_of(gap).cosine[at][:, at],
                               rtol=1e-12, atol=0)
    assert trace["text"][0][1] == f"{labels[0]} and {labels[1]}"


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metrics", "verdict"), [
    ({"verdict": "near", "rlvr/lr/ratio": 3.0}, "near"),
    ({"rlvr/step/meter/verdict_code": -1.0}, "overshoot"),
    ({"rlvr/step/meter/verdict_code": 0.0, "rlvr/lr/ratio": 0.1}, "undetermined"),
    ({"rlvr/step/success_break_even": 0.5, "rlvr/step/success_break_even_stderr": 0.1}, "overshoot"),
    ({"rlvr/step/success_break_even": 1.5, "rlvr/step/success_break_even_stderr": 0.1}, "near"),
    ({"rlvr/step/success_break_even": 1.1, "rlvr/step/success_break_even_stderr": 0.1}, "undetermined"),
    ({"rlvr/step/success_break_even": 3.0, "rlvr/step/success_break_even_stderr": 0.1}, "safe"),
    ({"rlvr/step/scan/success_gain/x1": -0.1, "rlvr/step/scan/success_gain_stderr/x1": 0.01}, "overshoot"),
    ({"rlvr/step/scan/success_gain/x1": 0.01, "rlvr/step/scan/success_gain_stderr/x1": 0.01}, "undetermined"),
    ({"rlvr/step/scan/success_gain/x1": 0.1, "rlvr/step/scan/success_gain_stderr/x1": 0.01,
      "rlvr/step/scan/break_even": "Infinity"}, "safe"),
    ({"rlvr/lr/ratio": 1.2}, "overshoot"),
    ({"learning_rate": 3e-4, "rlvr/step/guard/break_even_rate": 4e-4}, "near"),
    ({"learning_rate": 3e-4, "rlvr/step/guard/break_even_rate": math.inf}, "safe"),
    ({"rlvr/step/meter/break_even": 0.0}, "overshoot"),
    ({"rlvr/group/p_mean": 0.5}, None),
])
def test_each_kind_of_measurement_gives_its_verdict(tmp_path, metrics, verdict):
    run, = load(lines(tmp_path / "steps.jsonl", [{"step": 4} | metrics])).series
    assert judge(run)[0] == [verdict]
    assert headline(run).word == (verdict or "undetermined")


@pytest.mark.parametrize(("verdict", "ratio", "sentence"), [
    ("overshoot", 2.0, "The last step was 2 times its break-even. By its parabola half a break-even gains most: scale "
                       "the learning rate by about 0.25."),
    ("overshoot", math.inf, "No multiple of the last step helped."),
    ("safe", 0.25, "The last step used 25% of its break-even."),
    ("undetermined", 12.0, "The last step was 12 times its break-even by its best estimate, which its error does not "
                           "bear out."),
])
def test_advice_is_given_only_where_the_measurement_carries_it(tmp_path, verdict, ratio, sentence):
    RunLog(tmp_path).log(0, {"verdict": verdict, "rlvr/lr/ratio": ratio})
    assert sentence in headline(load(tmp_path).series[0]).facts


def test_an_undetermined_step_gives_its_reason(tmp_path, report):
    rows = [{"step": 1, "verdict": "safe"}, {"step": 2, "verdict": "undetermined", "reason": "few <b>prompts</b>"}]
    page = report(lines(tmp_path / "steps.jsonl", rows))
    assert "Undetermined since step 2 (1 in a row); safe before. Reason: few <b>prompts</b>." in page.text


def test_prompts_of_the_dump_are_counted_in_full_beside_a_spectrum_without_prompts():
    row = {"prompt": "a", "correct": 1, "rollouts": 2, "low": 0.1, "high": 0.9, "groups": 1, "mixed": 1.0}
    recorded = Recorded("run", (), {"prompts": [row] * 200, "summary": {"prompts": 5000}},
                        {"spectrum": {"prompts": []}}, {}, Counter(), 0)
    assert prompts_section(recorded).table.note == "100 of 5,000 prompts."
