"""What was to be reached beside what was: python -m gpu.targets OUTDIR prints a table and writes OUTDIR/targets.md.

Reads the CSV files and check.md alone. Of several kinds of logits the worst counts. Nothing is called reached that was
not measured at the target's own shape.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHAPE = "8192x152064x3584"  # Qwen2.5-7B's head
STEPS_SHAPE = "8192x4096"
OURS = "rlvr_fast triton"
ACCURATE = "torch fp32 chunks"
STATISTICS, HIDDEN_GRAD = "token_stats", "hidden_grad"
LAYER, LAYER_SHAPE = "segmented_gradient", "64x2048x18944x3584"  # a 7B model's MLP, 64 responses of 2048 tokens
HIDDEN_GAP, HEAD_GAP = "gradient_gap hidden", "gradient_gap head"
LESS_COMPUTING_PEERS = ("verl", "liger (Triton)", "cut-cross-entropy")
Figures = dict[tuple[str, str, str, str], dict[str, float]]  # (kernel, provider, shape, metric) -> median by logits


@dataclass(frozen=True)
class Target:
    """``value`` is None where it was not measured; ``goals`` are to be met one after the other."""

    text: str
    value: Callable[[Figures], float | None]
    goals: tuple[float, ...]
    at_least: bool
    unit: str = ""

    def line(self, figures: Figures) -> tuple[str, str, str, str]:
        """(text, goal, reached, verdict)."""
        sign = ">=" if self.at_least else "<="
        goal = ", then ".join(f"{sign} {self._written(value)}" for value in self.goals)
        value = self.value(figures)
        if value is None:
            return self.text, goal, "", "not measured"
        met = [value >= goal if self.at_least else value <= goal for goal in self.goals]
        verdict = "reached" if all(met) else "first goal reached" if met[0] else "not reached"
        return self.text, goal, self._written(value), verdict

    def _written(self, value: float) -> str:
        return f"{100 * value:.4g} %" if self.unit == "%" else f"{value:.3g}{self.unit}"


def figures_of(rows: list[dict[str, str]]) -> Figures:
    figures: Figures = {}
    for row in rows:
        if row["median"]:
            key = row["kernel"], row["provider"], row["shape"], row["metric"]
            figures.setdefault(key, {})[row["logits"]] = float(row["median"])
    return figures


def _worst(kernel: str, metric: str, pick=max, provider: str = OURS, shape: str = SHAPE):
    def value(figures: Figures) -> float | None:
        return pick(figures.get((kernel, provider, shape, metric), {}).values(), default=None)
    return value


def _speedup(peer: str):
    """The peer's milliseconds over ours, the least of the kinds of logits."""
    def value(figures: Figures) -> float | None:
        own, other = (figures.get((STATISTICS, name, SHAPE, "milliseconds"), {}) for name in (OURS, peer))
        return min((other[kind] / own[kind] for kind in own.keys() & other.keys()), default=None)
    return value


def _relative_error(kernel: str, name: str):
    """Our error over that of library products with float32 results."""
    def value(figures: Figures) -> float | None:
        own, other = (figures.get((kernel, provider, SHAPE, f"error of {name}"), {}) for provider in (OURS, ACCURATE))
        pairs = [(own[kind], other[kind]) for kind in own.keys() & other.keys()]
        return max((a / b if b else (0.0 if a == 0 else float("inf")) for a, b in pairs), default=None)
    return value


def _repeatable(figures: Figures) -> float | None:
    """The share of our providers' calls that gave the same bits twice, all kernels and shapes."""
    flags = [flag for (_, provider, _, metric), kinds in figures.items()
             if metric == "bitwise repeatable" and provider.startswith("rlvr_fast") for flag in kinds.values()]
    return sum(flags) / len(flags) if flags and _worst(STATISTICS, "bitwise repeatable")(figures) is not None else None


def _no_wait(kernel: str):
    return _worst(kernel, "calls without a host wait", min, "rlvr_fast", STEPS_SHAPE)


def targets() -> tuple[Target, ...]:
    share = "share of floor"
    fixed = [
        Target("token_stats, share of the product's rate", _worst(STATISTICS, share, min), (0.76, 0.86), True, "%"),
        *(Target(f"token_stats, times as fast as {peer}", _speedup(peer), (1.4,), True, "x")
          for peer in LESS_COMPUTING_PEERS),
        Target("gap at level hidden, over token_stats", _worst(HIDDEN_GAP, "x rlvr_fast token_stats"), (1.10,), False,
               "x"),
        Target("gap at level head, over token_stats", _worst(HEAD_GAP, "x rlvr_fast token_stats"), (2.1,), False, "x"),
        Target("hidden gradient per token, share of the rate of two products", _worst(HIDDEN_GRAD, share, min),
               (0.78, 0.85), True, "%"),
    ]
    over = "x library weight gradient"
    fixed.append(Target(f"{LAYER}, over the plain weight gradient", _worst(LAYER, over, shape=LAYER_SHAPE), (1.5,),
                        False, "x"))
    for kernel in ("advantages + loss_weights", "measure_step"):
        fixed.append(Target(f"{kernel}, share of the copy's rate", _worst(kernel, share, min, "rlvr_fast", STEPS_SHAPE),
                            (0.5,), True, "%"))
        fixed.append(Target(f"{kernel}, calls without a host wait", _no_wait(kernel), (1.0,), True, "%"))
    fixed += [Target(f"{kernel}, extra memory", _worst(kernel, "extra GB"), (0.5,), False, " GB")
              for kernel in (STATISTICS, HIDDEN_GAP, HEAD_GAP, HIDDEN_GRAD)]
    fixed += [Target(f"{kernel}, error of {name} over {ACCURATE}", _relative_error(kernel, name), (2.0,), False, "x")
              for kernel, name in ((STATISTICS, "logp"), (STATISTICS, "entropy"), (HIDDEN_GRAD, "hidden_grad"))]
    return (*fixed, Target("bitwise repeatable, all our calls", _repeatable, (1.0,), True, "%"))


def report(figures: Figures, checks: str | None, provenance: str) -> str:
    """Markdown."""
    head = ("target", "goal", "measured", "verdict")
    lines = [head, ("---",) * 4, *(target.line(figures) for target in targets())]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (f"# Targets\n\nHead {SHAPE} (N x V x D), bf16; the worst of random and peaked logits. {provenance}\n\n"
            f"{table}\n\n## Checks\n\n{checks or 'not run'}\n")


def main(out: Path) -> int:
    rows, provenance = [], set()
    for path in sorted(out.glob("*.csv")):
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        rows += found
        provenance |= {f"{row['gpu']}, driver {row['driver']}, {row['git_sha']}" for row in found}
    checks = out / "check.md"
    text = report(figures_of(rows), checks.read_text() if checks.exists() else None,
                  "; ".join(sorted(provenance)) or "Nothing was measured.")
    (out / "targets.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
