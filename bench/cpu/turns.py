"""A plug-in of pytest: options of the timing suites, and the list of tests that makes providers take turns."""

from __future__ import annotations

import pytest
import torch

from rlvr_fast.bench.registry import SUITES
from rlvr_fast.bench.workload import N_INPUT_SETS, Shape, Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rlvr_fast benchmarks")
    group.addoption("--shape", help="N,V,D")
    group.addoption("--rounds", type=int)
    group.addoption("--threads", type=int)
    group.addoption("--kernel", action="append", choices=list(SUITES), help="only this one; may be repeated")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per suite, round and provider, in that order: every provider of a suite runs before any runs again."""
    turns = [pytest.param((SUITES[name], turn, provider), id=f"{name}-round{turn}-{provider.name}")
             for name in metafunc.config.getoption("--kernel")
             for turn in range(metafunc.config.getoption("--rounds"))
             for provider in SUITES[name].providers]
    metafunc.parametrize("turn", turns)


def pytest_runtest_protocol(item: pytest.Function, nextitem: pytest.Item | None) -> None:
    """Says whose turn begins, for ``timings``."""
    turns = item.session.items
    print(f"turn {turns.index(item)} of {len(turns)}: {item.callspec.id}", flush=True)


@pytest.fixture(scope="session")
def workloads(request: pytest.FixtureRequest) -> list[Workload]:
    shape = Shape.parse(request.config.getoption("--shape"))
    return [Workload.draw(shape, index) for index in range(N_INPUT_SETS)]
