"""Every test times one provider once. The order of the tests interleaves the providers (``turns``), so whatever else
the machine does meets all of them alike, and ratios are taken between neighbours of one round."""

import pytest


def test_provider(turn, workloads, benchmark):
    suite, round_index, provider = turn
    if provider.missing is not None:
        pytest.skip(provider.missing)
    benchmark.group = suite.name
    benchmark.extra_info.update(kernel=suite.name, provider=provider.name, round=round_index)
    workload = workloads[round_index % len(workloads)]
    result = benchmark.pedantic(provider.run, args=(workload,), rounds=1, iterations=suite.calls_of(provider),
                                warmup_rounds=1 if round_index == 0 else 0)
    if round_index < len(workloads):
        benchmark.extra_info["error"] = (provider.check or suite.check)(result, workload)
