"""Settings shared by all tests: Triton's interpreter where there is no GPU, few threads, seeded generators."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib


def _has_gpu() -> bool:
    """Whether a CUDA device is there, asked without importing torch or triton."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports one

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))  # which is what OMP_NUM_THREADS and the affinity allow
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator seeded by the test's name: the same numbers on every machine, whatever device they go to."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def device() -> torch.device:
    """The device that ``backend="auto"`` is meant for on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def report(tmp_path):
    """``report(run, **options)`` writes a run's report and reads it as a ``report_pages.Page``."""
    from report_pages import Page

    from rlvr_fast.report import write_report

    return lambda run, **options: Page(write_report(run, tmp_path / "page.html", **options))


INTERPRETED_LOGITS = 3000  # the interpreter takes a second for about ten thousand
HEAD_PASSES = ("torch", "native-avx512", "native-avx2", "native-baseline",
               pytest.param("triton-cpu", marks=pytest.mark.interpreter),
               pytest.param("torch-cuda", marks=pytest.mark.gpu), pytest.param("triton-cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=HEAD_PASSES)
def head_pass(request: pytest.FixtureRequest):
    """Every implementation of the head pass as one function of CPU tensors, so that a test states its problem once.

    ``run(hidden, weight, tokens, bias, temperature, softcap)`` returns the TokenPass; with ``coefficients`` and
    ``cu_seqlens`` also the score sums [R, V].
    """
    from rlvr_fast import backends
    from rlvr_fast.backends import native_backend
    from rlvr_fast.head import Head

    name, _, variant = request.param.partition("-")
    if name == "native":
        if (reason := native_backend.unavailable(torch.device("cpu"))) is not None:
            pytest.skip(reason)
        try:
            native_backend._native.instruction_set(variant)
        except ValueError as error:
            pytest.skip(str(error))

    def run(hidden, weight, tokens, bias=None, temperature=1.0, softcap=None, coefficients=None, cu_seqlens=None):
        if name == "native":
            sums = None if coefficients is None else torch.empty(len(cu_seqlens) - 1, weight.shape[0])
            result = native_backend._run(hidden, tokens, Head(weight, bias, temperature, softcap), coefficients,
                                         cu_seqlens, sums, variant)
            return result if sums is None else (result, sums)
        place = torch.device(variant or "cpu")
        if name == "triton" and place.type == "cpu" and len(tokens) * len(weight) > INTERPRETED_LOGITS:
            pytest.skip(f"more than {INTERPRETED_LOGITS} logits are left to a GPU, the interpreter is too slow")
        operation = "head_pass" if coefficients is None else "head_pass_with_sums"
        extra = () if coefficients is None else (coefficients.to(place), cu_seqlens.to(place))
        head = Head(weight.to(place), None if bias is None else bias.to(place), temperature, softcap)
        result = backends.select(operation, name, place)(hidden.to(place), tokens.to(place), head, *extra)
        if coefficients is None:
            return backends.TokenPass(*(column.cpu() for column in result))
        return backends.TokenPass(*(column.cpu() for column in result[0])), result[1].cpu()

    return run
