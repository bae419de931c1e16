"""When a monitor measures: one window in so many, and never for more than its share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rlvr_fast import _validate as check


class Schedule:
    """Counts windows (training steps), times its owner's work, and says which windows are measured.

    Ranks that give ``plan`` the same costs measure the same windows.

    Args:
        every: measure one window in ``every``.
        budget: largest share of the wall time that measuring may take, or None for no limit. In a run whose windows
            take s seconds, a measured window that cost o of them is the only one in ⌈o / (budget · s)⌉. Until the
            third window no whole one has been seen, and each is measured; what that cost is paid back afterwards.
        clock: seconds, monotonic.

    Attributes:
        due: whether the current window is measured.
        window: its number. next_due: that of the next measured one, once this one is planned.
    """

    def __init__(self, every: int, budget: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int >= 1, got {check.describe(every)}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if budget is not None and check.positive("budget", budget) > 1:
            raise ValueError(f"budget must be a share of the time in (0, 1], or None; got {budget}")
        self.every, self.budget, self._clock = every, budget, clock
        self.window, self.next_due = 0, 0
        self.due = True
        self._window_start: float | None = None
        self._block_start: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []
        self._spent = 0.0  # of this window
        self._planned: float | None = None  # what plan() knew of it
        self._unplanned = 0.0  # of the last measured window: what came after plan()
        self._seconds, self._windows = 0.0, 0  # of the windows since the last planned one
        self._debt, self._next_debt = 0.0, 0.0  # spent while no budget could be known; with this window's
        self._waited = 0  # windows since then, whose budgets pay for it

    @contextmanager
    def timed(self, device: torch.device | None = None) -> Iterator[None]:
        """Count the time inside: the host's, or that of a CUDA device's stream where it is longer.

        Does not synchronise. Inside another such block it does nothing.
        """
        if self._block_start is not None:
            yield
            return
        self._block_start = start = self._clock()
        events = None
        if device is not None and device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record(torch.cuda.current_stream(device))
        try:
            yield
        finally:
            seconds, self._block_start = self._clock() - start, None
            if events is not None:
                events[1].record(torch.cuda.current_stream(device))
                self._events.append((*events, seconds))
            else:
                self._spent += seconds

    def costs(self) -> tuple[float, float]:
        """(seconds spent on this window and the rest of the last measured one, mean seconds of a window without them).

        The second is 0 until a whole window has been seen: where the first began is not known. Waits for the device
        work that was timed.
        """
        for start, stop, seconds in self._events:
            stop.synchronize()
            self._spent += max(seconds, start.elapsed_time(stop) / 1e3)
        self._events.clear()
        running = 0.0 if self._block_start is None else self._clock() - self._block_start
        return self._unplanned + self._spent + running, self._seconds / max(self._windows, 1)

    def plan(self, spent: float, window_seconds: float) -> None:
        """Fix the next measured window from ``costs``, those of the slowest rank where there are several."""
        interval, owed = self.every, self._debt + spent
        earned = 0.0 if self.budget is None else self.budget * window_seconds
        if owed > earned > 0:
            interval = max(interval, math.ceil(owed / earned) - self._waited)
        self._next_debt = 0.0 if earned > 0 else owed
        self.next_due = self.window + interval
        self._planned = spent - self._unplanned

    def end_window(self) -> None:
        """Go on to the next window."""
        now = self._clock()
        if self._planned is not None:
            self._unplanned = max(self._spent - self._planned, 0.0)
            self._seconds, self._windows = 0.0, 0
            self._debt = self._next_debt
        self._waited = self._waited + 1 if self._debt else 0
        if self._window_start is not None:
            self._seconds += max(now - self._window_start - self._spent, 0.0)
            self._windows += 1
        self._window_start, self._spent, self._planned = now, 0.0, None
        self._events.clear()
        self.window += 1
        self.due = self.window >= self.next_due

    def state_dict(self) -> dict[str, int]:
        return {"window": self.window, "next_due": self.next_due}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.window, self.next_due = int(state["window"]), int(state["next_due"])
        self.due = self.window >= self.next_due
