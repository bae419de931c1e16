"""Scenarios run by the ranks of gloo process groups, their answers kept on disk. Spawned processes import it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLINE = 300  # seconds for all of it
PATIENCE = 120  # seconds that a collective may wait, so that a missing rank fails the test instead of hanging it


def answer(rank: int, folder: str, worlds: tuple[int, ...],
           scenarios: Callable[[int], dict[str, Callable[[], object]]]) -> None:
    """All worlds that this rank is in, one after the other: starting a process costs more than its scenarios.

    ``scenarios``: by the number of ranks, in an order that every rank shares.
    """
    torch.set_num_threads(1)
    for ranks in worlds:
        if rank >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store of {ranks}", rank=rank, world_size=ranks,
                                timeout=timedelta(seconds=PATIENCE))
        answers = {}
        for name, scenario in scenarios(ranks).items():
            try:
                answers[name] = scenario()
            except Exception:
                answers[name] = traceback.format_exc()
                break  # the ranks are out of step
        torch.save(answers, Path(folder) / f"{rank} of {ranks}.pt")
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """What every rank of one world answered to every scenario."""

    count: int
    found: list[dict[str, object]]

    @classmethod
    def run(cls, work: Callable[[int, str], None], folder: Path, worlds: tuple[int, ...]) -> dict[int, Ranks]:
        """By the number of ranks; ``work(rank, folder)`` calls ``answer``.

        Fails if a process does, or if they take longer than ``DEADLINE``.
        """
        processes = mp.spawn(work, (str(folder),), nprocs=max(worlds), join=False)
        end = time.monotonic() + DEADLINE
        while not processes.join(max(end - time.monotonic(), 0.0)):  # returns whenever one of them ends
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"the ranks were not done after {DEADLINE} s")
        return {ranks: cls(ranks, [torch.load(folder / f"{rank} of {ranks}.pt", weights_only=False)
                                   for rank in range(ranks)]) for ranks in worlds}

    def answers(self, scenario: str) -> list:
        """Of one scenario, in rank order."""
        found = [answers.get(scenario, list(answers.values())[-1]) for answers in self.found]
        if any(isinstance(answer, str) and answer.startswith("Traceback") for answer in found):
            raise AssertionError("\n".join(map(str, found)))
        return found
