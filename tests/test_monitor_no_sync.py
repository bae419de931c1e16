"""``GapMonitor.update`` never waits for a device: it runs on meta tensors, which have no values to wait for."""

from __future__ import annotations

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast.monitor import GapMonitor

RESPONSES, PLACES = 8, 5


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(RESPONSES, device="meta", dtype=dtype)


def places(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(RESPONSES, PLACES, device="meta", dtype=dtype)


TOKENS = {"mask": places(torch.bool), "logp": places(), "old_logp": places(torch.bfloat16), "sum_p_sq": places(),
          "entropy": places()}
UPDATES = {
    "all tensors": {"rewards": rows(), "advantages": rows(), "prompt_ids": rows(torch.int64), **TOKENS},
    "ids on the host": {"correct": rows(torch.bool), "success_rate": rows(), "prompt_ids": list("aabbccdd"), **TOKENS},
    "advantages alone": {"advantages": rows(), "mask": places(torch.int64)},
    "rewards and advantages": {"rewards": rows(), "advantages": rows()},
}


@pytest.fixture
def monitor() -> GapMonitor:
    return GapMonitor(budget=None, group_size=4)


@pytest.mark.parametrize("data", UPDATES.values(), ids=UPDATES)
def test_update_reads_no_value_of_a_device_tensor(monitor, data):
    monitor.update(**data)
    assert monitor._increments[0].responses.cells.device.type == "meta"


def test_neither_does_the_update_of_a_gap(monitor):
    responses = rf.Responses(rows(torch.bool), rows(torch.int64), ("a", "b"))
    gradients = rf.ResponseGradients(responses, torch.empty(RESPONSES, 6, device="meta"))
    gap = rf.gap_from_gradients(gradients, level="hidden", length_norm=True, sizes=(4, 4))
    monitor.update(gap=gap, advantages=rows())
    assert monitor._increments[0].gradients.vectors.device.type == "meta"


def test_reading_a_value_of_a_meta_tensor_raises():
    """Without which the tests above could not fail."""
    with pytest.raises(RuntimeError):
        rows().sum().item()
    with pytest.raises(RuntimeError):
        bool((rows() > 0).any())
    with pytest.raises((RuntimeError, NotImplementedError)):
        rows()[rows() > 0]
