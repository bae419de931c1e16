"""The measurement of ModelGap's cost and fidelity on a tiny model: complete rows, the agreement it must find.

No time is asserted.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
OURS = {"rlvr_fast segmented", "rlvr_fast ghost", "rlvr_fast sketch", "rlvr_fast exact"}
PEERS = {"opacus ghost norms", "torch.func vmap(grad)", "loop over responses"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model_gap")
    options = ["--quick", "--prompts", "6", "--output", str(folder)]
    command = [sys.executable, str(BENCH / "model_gap" / "run.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def cost_rows(output):
    with (output / "model_gap_cost.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(output):
    return json.loads((output / "fidelity.json").read_text())


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from model_gap import agreement
    return agreement


def test_every_provider_is_timed_or_says_why_not(cost_rows):
    times = {row["provider"]: row for row in cost_rows if row["metric"] == "milliseconds"}
    assert times.keys() == OURS | PEERS | {"plain step"}
    for row in times.values():
        if row["median"]:
            assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
            assert 1 <= int(row["rounds"]) <= 2
        else:
            assert row["provider"] == "opacus ghost norms"
            assert row["note"] == "opacus is not installed"
    ratios = {row["provider"]: float(row["median"]) for row in cost_rows
              if row["metric"].startswith("times a plain step")}
    assert ratios.pop("plain step") == 1.0
    assert all(ratio > 0 for ratio in ratios.values())


def test_norms_agree_with_float64(cost_rows):
    """1e-5: float32 products of a model without cancellation. The sketch is an estimate: 4 standard deviations of its
    128 or more independent cells."""
    errors = {row["provider"]: float(row["error"]) for row in cost_rows
              if row["metric"] == "milliseconds" and row["error"]}
    assert errors.keys() >= OURS | PEERS - {"opacus ghost norms"}
    assert 0 < errors.pop("rlvr_fast sketch") < 0.5
    assert max(errors.values()) < 1e-5


def test_rows_have_their_provenance(cost_rows, output):
    with (output / "model_gap_fidelity.csv").open(newline="") as file:
        rows = [*cost_rows, *csv.DictReader(file)]
    for row in rows:
        assert row["device"]
        assert row["threads"] == "1"
        assert f"torch {torch.__version__}" in row["versions"]
        assert row["git_sha"]
        assert row["date"].startswith("20")


def test_fidelity_of_exact_and_sketched(report):
    """1e-5 as above; the sketch's rank correlation over six prompts may lose a neighbouring pair or two."""
    segmented = report["methods"]["segmented"]
    assert segmented["difference"]["relative_max"] < 1e-5
    assert segmented["rank"]["spearman"] == 1.0
    assert segmented["alignment"] == pytest.approx(1.0, abs=1e-6)
    for seed in (0, 1):
        sketch = report["methods"][f"sketch, seed {seed}"]
        assert 1e-4 < sketch["difference"]["relative_rms"] < 0.5
        assert sketch["rank"]["spearman"] > 0.7
        assert sketch["cosines between prompts"]["rank"]["spearman"] > 0.5


def test_levels_are_parts_of_the_whole(report):
    """The tiny model is not tied: its head's gap is a part of all parameters' gap."""
    assert not report["tied"]
    head, whole = report["methods"]["head"]["norm_sq_naive"], report["truth"]["norm_sq_naive"]
    assert all(0 < part < total for part, total in zip(head, whole, strict=True))
    for level in ("logits", "hidden", "head"):
        assert 0 < report["methods"][level]["alignment"] <= 1
    for groups in ("layers", "kinds"):
        assert math.fsum(entry["share"] for entry in report[groups].values()) == pytest.approx(1.0, abs=1e-9)
    assert set(report["layers"]) == {"layer 0", "layer 1", "embedding, lm_head", "final norm"}


def test_the_figure(output):
    pytest.importorskip("matplotlib")
    assert (output / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_rank_correlation(agreement):
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert agreement.spearman(x, np.exp(x)) == 1.0
    assert agreement.spearman(x, -x**3) == -1.0
    assert agreement.spearman(x, np.array([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)  # 1 − 6·4 / (5·24)
    assert agreement.spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(agreement.spearman(x, np.ones(5)))
    rank = agreement.rank_correlation(x, np.array([2.0, 1.0, 4.0, 3.0, 5.0]))
    assert rank["low"] < rank["spearman"] < rank["high"] <= 1.0


def test_alignment_knows_scale_and_rotation(agreement, generator):
    rows = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q
    turned = 3.0 * rows @ rotation + 1.0
    assert agreement.alignment(rows @ rows.T, turned @ turned.T) == pytest.approx(1.0)
    other = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    assert agreement.alignment(rows @ rows.T, other @ other.T) < 0.9
