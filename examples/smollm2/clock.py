"""Where the time of a step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Wall-clock seconds by section. What runs in a section inside another counts for the inner one only.

    ``announce`` is called with the name of the section that is entered.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._announce = announce
        self._section, self._since = "other", perf_counter()

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        outer = self._section
        self._switch(section)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, section: str) -> None:
        now = perf_counter()
        self.seconds[self._section] += now - self._since
        self._section, self._since = section, now
        self._announce(section)
