"""A step's responses for the tests of GapMonitor, and what the ranks of a process group do with their shares of them.

Needs no pytest: the spawned processes import it.
"""

from __future__ import annotations

from dataclasses import dataclass

import gloo_ranks
import torch
import torch.distributed as dist

import rlvr_fast as rf
from rlvr_fast.monitor import GapMonitor

WORLDS = (3, 2)
WINDOWS = 3
GROUP_SIZE = 4
# Groups straddle ranks; a rank has no response in the last window; what a rank sends first grows, then shrinks.
SHARES = {2: [lambda i: i % 3 == 0, lambda i: i % 3 != 0], 3: [lambda i: i < 5, lambda i: i % 2 == 0 and i >= 5,
                                                                 lambda i: i % 2 == 1 and i >= 5]}


REWARDS = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0])  # solved, failed, p = 1/4, p = 1/2
IDS = torch.arange(4).repeat_interleave(4)


def monitor(**options) -> GapMonitor:
    """Without a budget and running means, unless asked for."""
    return GapMonitor(**{"budget": None, "decay": None} | options)


def once(*, of: GapMonitor | None = None, **data) -> dict[str, float]:
    """The metrics of one update, without what the monitor says of its own time."""
    own = monitor() if of is None else of
    own.update(**data)
    return without_time(own.compute())


def without_time(found: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if "/time/" not in key}


@dataclass(frozen=True)
class Step:
    """R responses of T token places, with everything that a training loop may hold of them."""

    ids: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor
    prompt_ids: list[str]
    advantages: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    logp: torch.Tensor
    old_logp: torch.Tensor
    sum_p_sq: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def sample(cls, seed: int, prompts: int = 6, places: int = 7, vocabulary: int = 11, width: int = 5) -> Step:
        generator = torch.Generator().manual_seed(seed)
        n = prompts * GROUP_SIZE
        ids = torch.randint(0, vocabulary, (n, places), generator=generator)
        lengths = torch.randint(0, places + 1, (n,), generator=generator)
        mask = torch.arange(places) < lengths[:, None]
        correct = torch.rand(n, generator=generator) < 0.5
        correct[:GROUP_SIZE] = True
        correct[GROUP_SIZE:2 * GROUP_SIZE] = False
        correct[2 * GROUP_SIZE:4 * GROUP_SIZE] = torch.tensor([True, False, True, False, True, True, False, True])
        order = torch.randperm(n, generator=generator).tolist()  # groups are not together
        hidden = torch.randn(n, places, width, generator=generator, dtype=torch.float64).float()
        weight = torch.randn(vocabulary, width, generator=generator)
        log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
        logp = log_p.gather(-1, ids[..., None])[..., 0]
        rollouts = rf.Rollouts.from_padded(ids, mask, correct.float(), group_size=GROUP_SIZE)
        names = [f"{seed} {i // GROUP_SIZE}" for i in range(n)]
        whole = cls(ids, mask, correct, names, rf.advantages(rollouts), hidden, weight, logp,
                    logp + 0.1 * torch.randn(n, places, generator=generator), log_p.exp().square().sum(-1),
                    -(log_p.exp() * log_p).sum(-1))
        return whole.rows(order)

    def rows(self, index: list[int]) -> Step:
        values = {name: ([value[i] for i in index] if name == "prompt_ids" else
                         value if name == "weight" else value[index]) for name, value in vars(self).items()}
        return Step(**values)

    @property
    def rollouts(self) -> rf.Rollouts:
        return rf.Rollouts.from_padded(self.ids, self.mask, self.correct.float(), prompt_ids=self.prompt_ids)

    def feed(self, monitor: GapMonitor) -> None:
        """All tiers at once."""
        monitor.update(self.rollouts, advantages=self.advantages, logp=self.logp, old_logp=self.old_logp,
                       sum_p_sq=self.sum_p_sq, entropy=self.entropy, hidden=self.hidden, weight=self.weight)


def windows(rank: int | None = None, ranks: int = 1) -> list[Step | None]:
    """The windows' steps, or a rank's share of them."""
    steps: list[Step | None] = [Step.sample(seed, prompts=4 + 2 * (seed % 2)) for seed in range(WINDOWS)]
    if rank is None:
        return steps
    for number, step in enumerate(steps):
        own = [i for i in range(len(step.ids)) if SHARES[ranks][rank](i)]
        if number == WINDOWS - 1:  # the last rank has none
            own = [] if rank == ranks - 1 else list(range(rank, len(step.ids), ranks - 1))
        steps[number] = step.rows(own) if own else None
    return steps


def figures(monitor: GapMonitor, steps: list[Step | None]) -> list[dict[str, float]]:
    """Of every window, fed in two micro-batches."""
    found = []
    for step in steps:
        if step is not None:
            half = len(step.ids) // 2
            for index in (range(half), range(half, len(step.ids))):
                if len(index):
                    step.rows(list(index)).feed(monitor)
        found.append(monitor.compute())
        monitor.reset()
    return found


class SlowClock:
    """A clock on which every look costs this rank's own time."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def scenarios(ranks: int) -> dict:
    rank = dist.get_rank()

    def metrics():
        monitor = GapMonitor(group_size=GROUP_SIZE, budget=None, group=dist.group.WORLD)
        found = figures(monitor, windows(rank, ranks))
        return found, monitor._exchange.collectives

    def schedule():
        """Ranks of different speed, on a budget."""
        monitor = GapMonitor(budget=0.05, group=dist.group.WORLD)
        monitor._schedule._clock = clock = SlowClock(1.0 + rank)
        measured = []
        for _ in range(12):
            measured.append(monitor.due)
            monitor.update(rewards=torch.tensor([1.0, 0.0]), prompt_ids=[0, 0])
            clock.now += 40.0
            monitor.compute()
            monitor.reset()
        return measured

    def differing():
        return refused(GapMonitor(level="hidden" if rank else "logits", budget=None, group=dist.group.WORLD).compute)

    def out_of_step():
        monitor = GapMonitor(budget=None, group=dist.group.WORLD)
        if rank:
            monitor.reset()
        return refused(monitor.compute)

    def not_global():
        monitor = GapMonitor(group_size=GROUP_SIZE, budget=None, group=dist.group.WORLD)
        monitor.update(rewards=torch.tensor([1.0, 0.0, 0.0]), prompt_ids=[0, 0, 0])
        return refused(monitor.compute)

    return {"metrics": metrics, "schedule": schedule, "differing": differing, "out of step": out_of_step,
            "not global": not_global}


def refused(call) -> str:
    """The words of the ValueError that ``call`` must raise."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def work(rank: int, folder: str) -> None:
    gloo_ranks.answer(rank, folder, WORLDS, scenarios)
