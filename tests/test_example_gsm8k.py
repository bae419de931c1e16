"""The GSM8K example: its verifier, its problems, and the whole loop on a tiny random Qwen2 with every guard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from batching import batches  # noqa: E402
from gsm8k import problems as task  # noqa: E402


@pytest.mark.parametrize(("completion", "reward"), [
    ("\\boxed{72}", 1), ("so there are 72", 1), ("the answer is \\boxed{72.0}", 1), ("#### 72", 1),
    ("\\boxed{\\frac{144}{2}}", 1), ("\\boxed{7}", 0), ("\\boxed{72} or rather \\boxed{3}", 0), ("", 0),
    ("boxed{}}}{", 0)])
def test_the_last_answer_decides(completion, reward):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert task.Problem("?", "72").reward(completion) == reward


def test_problems_as_published(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "1,000 + 72 = <<1000+72=1072>>\n#### 1,072"}) + "\n")
    assert task.gsm8k(str(path), "train") == [task.Problem("How many?", "1072")]


def test_batches_hold_distinct_problems_and_use_all_of_them():
    problems = [task.Problem(str(i), "0") for i in range(7)]
    drawn = batches(problems, 3, seed=0)
    first, second = next(drawn), next(drawn)
    assert len(set(first + second)) == 6
    with pytest.raises(ValueError, match=r"must be in 1\.\.7"):
        next(batches(problems, 8, seed=0))


@pytest.mark.parametrize("guard", ["off", "warn", "scale", "backtrack"])
def test_the_loop_runs_on_a_tiny_model(guard, tmp_path):
    for module in ("transformers", "reasoning_gym", "math_verify"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    command = [sys.executable, str(EXAMPLES / "grpo_qwen_gsm8k.py"), "--tiny", "--steps", "2", "--guard", guard,
               "--learning-rate", "1e-3", "--prompts", "16", "--held-out-prompts", "16", "--judge-every", "2",
               "--micro-batch", "64", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines())
    assert first["verdict"] in ("safe", "near", "overshoot", "undetermined")
    assert "verdict" not in second  # judged every other step
    assert 0 < first["success"] < 1
    assert first["rlvr/gap/norm_sq"] != second["rlvr/gap/norm_sq"]
    assert ("rlvr/step/guard/scale" in second) == (guard != "off")
