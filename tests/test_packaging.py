"""What a user installs: the sdist suffices to build the wheel, and the wheel works without the checkout."""

from __future__ import annotations

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
