"""Training runs in processes of their own that take turns, one optimizer step each, so that all meet the same machine.

Only one of them computes at a time; the others wait for a message.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from transformers import TrainerCallback


class Turn(TrainerCallback):
    """In a run's process: waits for its turn before every step, says how long the step took.

    A step lasts from one ``on_step_begin`` to the next: sampling, loss, backward, optimizer, logging.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began: tuple[float, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report()
        self._pipe.recv()
        self._began = time.perf_counter(), time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report()

    def _report(self) -> None:
        if self._began is None:
            self._pipe.send("ready")
        else:
            wall, cpu = self._began
            self._pipe.send((time.perf_counter() - wall, time.process_time() - cpu))


@dataclass
class Run:
    """What one run took and returned.

    Attributes:
        wall, cpu: seconds of every step; CPU time is that of all threads of its process.
        result: what its function returned.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Any = None


def take_turns(runs: dict[str, Callable[[Turn], Any]], steps: int, say: Callable[[str], None]) -> dict[str, Run]:
    """Run all; in every round each takes one step, and the next round begins with another one.

    Args:
        runs: functions that train for ``steps`` steps with the ``Turn`` among the trainer's callbacks. They run in
            forked processes, so that what was loaded before is shared until it is written to.

    Raises:
        RuntimeError: if a process ends early; it has said why.
    """
    context = multiprocessing.get_context("fork")
    pipes, processes, done = {}, [], {name: Run() for name in runs}
    try:
        for name, function in runs.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=_run, args=(function, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            _receive(pipes, name)  # ready: one at a time sets up
        names = list(runs)
        for step in range(steps):
            shift = step % len(names)
            for name in names[shift:] + names[:shift]:
                pipes[name].send("go")
                wall, cpu = _receive(pipes, name)
                done[name].wall.append(wall)
                done[name].cpu.append(cpu)
            say(f"step {step + 1}: " + ", ".join(f"{name} {done[name].cpu[-1]:.2f} s" for name in names))
        for name in names:
            done[name].result = _receive(pipes, name)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return done


def _run(function: Callable[[Turn], Any], pipe: Connection) -> None:
    pipe.send(function(Turn(pipe)))


def _receive(pipes: dict[str, Connection], name: str) -> Any:
    try:
        return pipes[name].recv()
    except EOFError as error:
        raise RuntimeError(f"the run {name!r} ended early") from error
