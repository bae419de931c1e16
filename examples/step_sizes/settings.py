"""What is swept, and everything else that shapes a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product


@dataclass(frozen=True)
class RunSettings:
    """One GRPO run."""

    n_totals: int
    learning_rate: float
    seed: int
    guard: str = "off"
    n_steps: int = 24
    ramp_steps: int = 5  # the learning rate grows to its full size over these
    warm_up_success: float = 0.3
    width: int = 32
    n_prompts: int = 64
    group_size: int = 8
    n_held_out: int = 512  # problems for the probes and for the exact success, never trained on
    n_probe_prompts: int = 32
    probe_group_size: int = 8
    scan_multiples: tuple[float, ...] = (0.125, 0.25, 0.5, 1, 2)
    true_multiples: tuple[float, ...] = (0.125, 0.25, 0.5, 2, 4)  # and 1, which is applied
    truth_every: int = 4  # steps

    @property
    def length(self) -> int:
        """Tokens of a right answer."""
        return self.n_totals + 1

    def rate_at(self, step: int) -> float:
        return self.learning_rate * min(1, (step + 1) / self.ramp_steps)

    @property
    def warm_up_name(self) -> str:
        """Runs of one name start from one warmed-up policy."""
        return f"length{self.length}-seed{self.seed}"

    @property
    def name(self) -> str:
        return f"length{self.length}-{self.guard}-rate{self.learning_rate:.2e}-seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """Every length, seed and rate; without a guard, and for some lengths in each of its modes."""

    n_totals: tuple[int, ...] = (3, 7, 15)
    learning_rates: tuple[float, ...] = tuple(1e-4 * 10 ** (i / 3) for i in range(7))
    n_seeds: int = 5
    guards: tuple[str, ...] = ("scale", "backtrack")
    guarded_n_totals: tuple[int, ...] = (7,)
    guarded_learning_rates: tuple[float, ...] = tuple(1e-4 * 10 ** (i / 3) for i in range(2, 7))
    run: RunSettings = RunSettings(0, 0.0, 0)  # everything else

    def runs(self) -> list[RunSettings]:
        """Seed by seed, so that what is there after an interruption is a smaller sweep."""
        kinds = [*product(("off",), self.n_totals, self.learning_rates),
                 *product(self.guards, self.guarded_n_totals, self.guarded_learning_rates)]
        return [replace(self.run, n_totals=n, learning_rate=rate, seed=seed, guard=guard)
                for seed, (guard, n, rate) in product(range(self.n_seeds), kinds)]


QUICK = Sweep(n_totals=(2, 4), learning_rates=(1e-3, 3e-2), n_seeds=1, guarded_n_totals=(2,),
              guarded_learning_rates=(3e-2,), run=RunSettings(
    0, 0.0, 0, n_steps=3, ramp_steps=2, warm_up_success=0.1, width=16, n_prompts=16, n_held_out=64, n_probe_prompts=16))
