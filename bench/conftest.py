"""Options of the timing suites, and the list of tests that makes providers take turns."""

from __future__ import annotations

import os

import pytest
import torch
from registry import SUITES
from workload import N_INPUT_SETS, Shape, Workload

DEFAULT_SHAPE, DEFAULT_ROUNDS, DEFAULT_THREADS = "2048,49152,576", 6, 2


def pytest_addoption(parser):
    group = parser.getgroup("rlvr_fast benchmarks")
    group.addoption("--shape", default=DEFAULT_SHAPE, help="N,V,D")
    group.addoption("--rounds", type=int, default=DEFAULT_ROUNDS)
    group.addoption("--threads", type=int, default=min(DEFAULT_THREADS, os.cpu_count() or 1))
    group.addoption("--kernel", action="append", choices=list(SUITES), help="only this one; may be repeated")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """One test per suite, round and provider, in that order: every provider of a suite runs before any runs again."""
    if "turn" not in metafunc.fixturenames:
        return
    turns = [pytest.param((suite, turn, provider), id=f"{suite.name}-round{turn}-{provider.name}")
             for suite in SUITES.values() if suite.name in (metafunc.config.getoption("--kernel") or SUITES)
             for turn in range(metafunc.config.getoption("--rounds"))
             for provider in suite.providers]
    metafunc.parametrize("turn", turns)


@pytest.fixture(scope="session")
def workloads(request) -> list[Workload]:
    shape = Shape.parse(request.config.getoption("--shape"))
    return [Workload.draw(shape, index) for index in range(N_INPUT_SETS)]
