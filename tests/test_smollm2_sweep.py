"""The SmolLM2 sweep's table and figure, from made-up runs; the sweep itself needs the pretrained model."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from smollm2.sweep_report import draw, markdown  # noqa: E402


def run(mode: str, successes: list[float], announced: list[bool]) -> dict:
    seconds = {"sampling": 1.0, "observing": 1.0, "training": 1.0, "checking": 0.5, "stepping": 0.5}
    return {"learning_rate": 1e-4, "mode": mode, "seed": 0, "steps": [
        {"step": i + 1, "before": before, "after": after, "announced": told, "scale": 0.5, "backtracks": 2.0,
         "seconds": seconds}
        for i, (before, after, told) in enumerate(zip(successes, successes[1:], announced, strict=False))]}


def test_the_table_counts_losses_and_announcements():
    rows = markdown([run("warn", [0.6, 0.7, 0.5, 0.4], [False, False, True]), run("backtrack", [0.6, 0.7], [False])])
    told, guarded = rows.splitlines()[2:]
    assert told.startswith("| 0.0001 | no guard (it only tells) | 60.0% | 40.0% | 40.0% | 2 of 3 | 1 | 0.50 × |")
    assert told.endswith("| 38% |")  # observing and checking
    assert guarded.endswith("| 0 of 1 | 0 | 0.50 × | 2 | 50% |")  # and its checks inside the step


def test_the_figure_is_written(tmp_path):
    draw([run("warn", [0.6, 0.7], [False]), run("scale", [0.6, 0.7], [False])], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
