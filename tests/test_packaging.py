"""What a user installs: the sdist suffices to build the wheel, and the wheel works without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the unpacked sdist."""
    for tool in ("build", "setuptools", "pybind11"):
        pytest.importorskip(tool)
    target = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "checkout"
    unwanted = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "outputs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)  # building in the checkout would leave files there
    environment = os.environ | {"CUDA_HOME": str(target)}  # without nvcc: the CUDA extension is optional, and slow
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source], check=True,
                   capture_output=True, env=environment)
    assert [path for path in target.iterdir() if path.name.endswith(".tar.gz")]
    return next(target.glob("*.whl"))


def test_wheel_holds_the_package_the_kernels_and_the_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rlvr_fast").rglob("*.py")}
    modules |= {f"rlvr_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    modules |= {f"rlvr_fast/bench/{path.name}" for path in (ROOT / "bench" / "cpu").glob("*.py")}
    assert (modules | {"rlvr_fast/py.typed", "rlvr_fast/kernels/tuned.json"}) <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "kernels/", "bench/", "examples/")) for name in names)
    if shutil.which("g++") or shutil.which("c++"):
        assert any(name.startswith("rlvr_fast/_native") for name in names)


def test_wheel_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = """
import torch, rlvr_fast as rf, rlvr_fast.kernels
torch.manual_seed(0)
rollouts = rf.Rollouts.from_packed(torch.randint(0, 50, (40,)), torch.arange(0, 41, 5), torch.tensor([0.0, 1.0] * 4),
                                   group_size=4)
gap = rf.gradient_gap(torch.randn(40, 16), torch.randn(50, 16), rollouts)
assert gap.defined.all() and gap.norm_sq.isfinite().all()
print(rf.__file__, rlvr_fast.kernels.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True,
                          capture_output=True, text=True)
    assert all(Path(path).is_relative_to(tmp_path) for path in done.stdout.split())


# -- the command, installed by pip, in a folder without the checkout --------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    pytest.importorskip("pip")
    site = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site,
                    wheel], check=True, capture_output=True)
    return site


@pytest.fixture
def rlvr_fast_command(installed, tmp_path):
    """Runs the installed script elsewhere and gives what it printed; a command that fails fails the test."""
    script = installed / "bin" / "rlvr-fast"

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, str(script), *arguments], cwd=tmp_path, check=False, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": str(installed)})
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    return run


def test_the_installed_command_tells_its_version_and_what_runs_here(rlvr_fast_command):
    import rlvr_fast

    assert rlvr_fast_command("--version") == f"rlvr-fast {rlvr_fast.__version__}\n"
    sections = json.loads(rlvr_fast_command("doctor", "--json"))
    found = {finding["subject"]: finding["state"] for section in sections.values() for finding in section}
    assert found["torch (any device)"] == "ok"
    assert found["rlvr-fast demo"] == ("ok" if importlib.util.find_spec("matplotlib") else "absent")
    if shutil.which("g++") or shutil.which("c++"):
        assert found["native (CPU)"] == "ok"


def test_the_installed_demo_runs(rlvr_fast_command, tmp_path):
    pytest.importorskip("matplotlib")
    content = json.loads(rlvr_fast_command("demo", "--quick", "--steps", "1", "-o", "out", "--json"))
    assert [len(run["steps"]) for run in content["runs"]] == [1, 3]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"steps.jsonl", "grpo_arithmetic.png"}


def test_the_installed_benchmarks_run(rlvr_fast_command, tmp_path):
    """In a folder whose pytest.ini would stop any pytest that read it."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    content = json.loads(rlvr_fast_command(
        "bench", "--shape", "64,300,16", "--rounds", "1", "--threads", "1", "--kernel", "advantages + loss_weights",
        "-o", "out", "--json", "-"))
    rows = [row for row in content["rows"] if row["metric"] == "milliseconds"]
    assert [row["provider"] for row in rows] == ["gemm", "rlvr_fast", "torch, grouped view", "torch, dict of groups"]
    assert all(row["median"] > 0 and row["git_sha"] == "no checkout" for row in rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cpu_64x300x16.csv"]
