"""Time of interleaved calls: by CUDA events on a GPU, by the host's clock elsewhere. The rest knows one interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# About 2 ms: the device waits that long before each lap, so that the host has enqueued the call when it starts and
# Python's own time stays out of the measurement, unless the call waits for the device itself.
LEAD_CYCLES = 4_000_000


class Clock(Protocol):
    """``start`` and ``stop`` bracket work; ``milliseconds`` of the two marks is asked for after ``wait``."""

    def start(self) -> Any: ...
    def stop(self) -> Any: ...
    def wait(self) -> None: ...
    def milliseconds(self, start: Any, stop: Any) -> float: ...


class EventClock:
    """CUDA events in the current stream."""

    def start(self) -> torch.cuda.Event:
        torch.cuda._sleep(LEAD_CYCLES)
        return self.stop()

    def stop(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop)


class HostClock:
    """perf_counter, for a device that finishes before it returns."""

    def start(self) -> float:
        return time.perf_counter()

    stop = start

    def wait(self) -> None:
        pass

    def milliseconds(self, start: float, stop: float) -> float:
        return 1e3 * (stop - start)


def clock_for(device: torch.device) -> Clock:
    return EventClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile, interpolated linearly between the ordered values."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(*(_percentile(sorted(values), share) for share in (0.2, 0.5, 0.8)))

    def reciprocal(self, numerator: float) -> Spread:
        """Spread of numerator / value: the quick calls give the high rates."""
        return Spread(numerator / self.p80, numerator / self.median, numerator / self.p20)


def _percentile(ordered: list[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def interleave(clock: Clock, calls: Mapping[str, Callable[[int], Any]], rounds: int, n_sets: int
               ) -> dict[str, list[float]]:
    """Milliseconds of every call in every round.

    All take turns within a round, on the same input set; the next round takes the next set and begins one call later,
    so that nobody always runs after the same neighbour.
    """
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds):
        shift = turn % max(len(names), 1)
        marks = {}
        for name in names[shift:] + names[:shift]:
            start = clock.start()
            calls[name](turn % n_sets)
            marks[name] = start, clock.stop()
        clock.wait()
        for name, (start, stop) in marks.items():
            times[name].append(clock.milliseconds(start, stop))
    return times
