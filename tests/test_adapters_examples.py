"""The loops that newcomers read first run as they are, learn, and leave a folder that the report can show."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_packs import centred_step
from monitor_ranks import GROUP_SIZE
from test_adapters_openrlhf import experience

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import openrlhf_experience  # noqa: E402
import packed_loop  # noqa: E402
import plain_loop  # noqa: E402

from rlvr_fast import StepWarning  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StepWarning)
        yield


def test_the_plain_loop_learns_and_its_folder_has_a_report(tmp_path, capsys):
    success = plain_loop.main(tmp_path / "run", steps=30)
    assert success[0] < 0.1
    assert success[-1] > 0.8
    assert capsys.readouterr().out.count("step ") >= 30
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(30))
    assert {"rlvr/gap/norm", "rlvr/gap/cos_update", "rlvr/step/meter/verdict_code"} <= rows[10].keys()
    pytest.importorskip("plotly", reason="needs the report extra")
    from rlvr_fast.report import write_report

    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    for section in ("Is the step safe?", "For which prompts", "Success over steps", "Gradient gap"):
        assert f"<h2>{section}" in page


def test_micro_batches_do_not_change_what_the_plain_loop_does_or_reports(tmp_path, monkeypatch):
    def run(size: int) -> tuple[list[float], dict[str, float]]:
        monkeypatch.setattr(plain_loop, "MICRO_BATCH", size)
        success = plain_loop.main(tmp_path / str(size), steps=2)
        last = json.loads((tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()[-1])
        return success, {key: last[key] for key in ("rlvr/gap/norm_sq", "rlvr/gap/cos_update", "rlvr/logp/gap")}

    torn, whole = run(7), run(plain_loop.LARGEST * plain_loop.GROUP)
    assert torn[0] == whole[0]
    assert torn[1] == pytest.approx(whole[1], rel=1e-4)  # gradients summed in float32 in another order


def test_the_guard_saves_what_a_long_step_loses(tmp_path):
    watched, scaled = (plain_loop.main(tmp_path / mode, learning_rate=0.2, guard=mode, steps=25)[-1]
                       for mode in ("warn", "scale"))
    assert scaled > watched + 0.05


def test_a_short_first_example(monkeypatch, capsys):
    """Under 60 lines of code, and as a script."""
    lines = (EXAMPLES / "plain_loop.py").read_text().split('"""', 2)[2].splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) < 60
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")
    assert "--guard" in capsys.readouterr().out


def test_the_packed_loop_recovers_what_it_is_not_told():
    history = packed_loop.main(steps=12)
    assert history[-1]["success"] > 0.3
    for step in history:  # no group is all right yet: all success is that of mixed groups
        assert step["rlvr/group/frac_mixed"] * step["rlvr/group/p_mixed"] == pytest.approx(step["success"], rel=1e-5)


def test_the_guides_code_runs(tmp_path, monkeypatch):
    page = EXAMPLES.parent / "docs" / "frameworks" / "README.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    runnable = [code for code in blocks if not code.startswith("# not run: ")]
    assert len(runnable) == 2
    monkeypatch.chdir(tmp_path)
    for code in runnable:
        exec(compile(code, str(page), "exec"), {"__name__": "page"})
    assert (tmp_path / "outputs" / "run" / "metrics.jsonl").is_file()


def test_the_openrlhf_example_adds_to_the_drivers_statistics():
    class Driver:
        args = SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=GROUP_SIZE),
                               algo=SimpleNamespace(advantage=SimpleNamespace(estimator="dr_grpo")))

        def _compute_rollout_stats(self, experiences):
            return {"rollout/num_samples": float(sum(len(one.sequences) for one in experiences))}

    step = centred_step()
    step = step.rows(sorted(range(len(step.prompt_ids)), key=lambda i: step.prompt_ids[i]))
    every = list(range(len(step.prompt_ids)))
    driver = openrlhf_experience.with_gap(Driver)()
    stats = driver._compute_rollout_stats([experience(step, every)])
    assert stats["rollout/num_samples"] == len(every)
    assert stats["rlvr/group/p_mean"] == pytest.approx(float(step.correct.double().mean()))
    assert "rlvr/gap/kappa" in stats
    Driver.args.algo.advantage.estimator = "gae"
    other = openrlhf_experience.with_gap(Driver)()._compute_rollout_stats([experience(step, every)])
    assert "rlvr/gap/kappa" not in other


def test_the_openrlhf_example_on_openrlhfs_own_driver():
    trainer = pytest.importorskip("openrlhf.trainer.ppo_trainer", reason="needs all that OpenRLHF needs",
                                  exc_type=ImportError)
    step = centred_step()
    step = step.rows(sorted(range(len(step.prompt_ids)), key=lambda i: step.prompt_ids[i]))
    driver = object.__new__(openrlhf_experience.with_gap(trainer.BasePPOTrainer))
    driver.args = SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=GROUP_SIZE),
                                  algo=SimpleNamespace(advantage=SimpleNamespace(estimator="dr_grpo")))
    n = len(step.prompt_ids)
    lengths, off = step.mask.sum(1), torch.zeros(n)
    stats = driver._compute_rollout_stats([experience(step, list(range(n)), response_length=lengths, truncated=off)])
    assert stats["rollout/reward_mean"] == pytest.approx(stats["rlvr/group/p_mean"])
    assert stats["rollout/response_length_mean"] == pytest.approx(stats["rlvr/length/mean"])
    ray = pytest.importorskip("ray")
    launched = openrlhf_experience.with_gap(trainer.PPOTrainer.__ray_metadata__.modified_class)
    assert issubclass(ray.cloudpickle.loads(ray.cloudpickle.dumps(launched)), trainer.BasePPOTrainer)


def test_the_skyrl_example_gives_the_trainer_its_callback(monkeypatch):
    pytest.importorskip("skyrl.train.entrypoints.main_base", reason="needs SkyRL and all that it needs",
                        exc_type=Exception)
    example = importlib.import_module("skyrl_callback")
    given = []
    trainer = SimpleNamespace(add_callback=given.append)
    monkeypatch.setattr(example.BasePPOExp, "get_trainer", lambda self, *args, **kwargs: trainer)
    assert example.GapExperiment.get_trainer(object.__new__(example.GapExperiment)) is trainer
    assert [type(one) for one in given] == [example.GapCallback]
