"""Measure which tile of the head kernels is fastest for one shape on this GPU; opt-in, never inside a training step.

    python -m rlvr_fast.tuning --hidden-size 3584 --vocabulary-size 152064 --tokens 8192 --output tiles.json

and in the training script ``rf.load_tiles("tiles.json")``. Measured are three calls as users make them:
``token_stats``; ``gradient_gap`` at level "hidden"; forward and backward of ``linear_logprob``. All tiles take turns
call by call on three input sets of random numbers, peaked as a policy's are (on zeros a GPU is faster than it ever is
in use), and are compared by the sum of the three medians.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rlvr_fast import _validate as check
from rlvr_fast.gap import gradient_gap
from rlvr_fast.kernels import config
from rlvr_fast.kernels.config import HeadTile, TunedTile
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.synthetic import SyntheticBatch, whole
from rlvr_fast.token_stats import token_stats
from rlvr_fast.tuned_tiles import check_tile, merge_tiles

INPUT_SETS = 3
SMALLEST_GAIN = 0.02  # medians that differ by less say more about the clock than about the tile
# Relative, in the 2-norm. Between two tiles only the order of fp32 additions differs, 1e-6; where a result is rounded
# to 16 bits afterwards, a few entries in a hundred fall to the other side: 5e-4. A tile of columns left out changes
# 1e-4 of the log-probs.
FP32_TOLERANCE, HALF_TOLERANCE = 3e-5, 2e-3
TOKENS_PER_RESPONSE, GROUP_SIZE = 512, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TileTiming:
    """What one tile took: median milliseconds per operation, in the report's order; or why it was rejected."""

    tile: HeadTile
    medians: tuple[float, ...]
    rejected: str | None = None

    @property
    def milliseconds(self) -> float:
        return sum(self.medians)


@dataclass(frozen=True, repr=False)
class TuneReport:
    """Measurements of one shape. ``timings`` begins with the default tile.

    Attributes:
        chip, architecture, dtype: what it holds for.
        shape: (N, V, D).
        operations: what was measured.
        repeats: calls per tile and operation.
        versions, date: with what, and when.
    """

    chip: str
    architecture: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    operations: tuple[str, ...]
    timings: tuple[TileTiming, ...]
    repeats: int
    versions: dict[str, str]
    date: str

    @property
    def default(self) -> TileTiming:
        return self.timings[0]

    @property
    def best(self) -> TileTiming:
        """The fastest tile that computes what the default does; the default unless it is beaten by 2 % or more."""
        fastest = min((timing for timing in self.timings if timing.rejected is None), key=lambda t: t.milliseconds)
        return fastest if fastest.milliseconds < (1 - SMALLEST_GAIN) * self.default.milliseconds else self.default

    @property
    def entry(self) -> TunedTile:
        """The best tile as an entry of a table, also where that is the default: then it is known to be."""
        return TunedTile(self.chip, self.architecture, self.dtype.itemsize, *self.shape, self.best.tile,
                         self.best.milliseconds, self.default.milliseconds, self.operations, self.date, self.versions)

    def __repr__(self) -> str:
        n, v, d = self.shape
        lines = [f"TuneReport({self.chip}, {self.dtype}, N={n}, V={v}, D={d}; medians of {self.repeats}, milliseconds)",
                 f"{'tile':<72} {'sum':>9}  " + "  ".join(self.operations)]
        for timing in self.timings:
            marks = ", ".join(name for name in ("default", "best") if timing is getattr(self, name))
            label = f"{timing.tile} ({marks})" if marks else str(timing.tile)
            figures = "  ".join(f"{value:>{len(name)}.3f}"
                                for value, name in zip(timing.medians, self.operations, strict=False))
            lines.append(f"{label:<72} " + (f"rejected: {timing.rejected}" if timing.rejected
                                            else f"{timing.milliseconds:>9.3f}  {figures}"))
        return "\n".join(lines)


@dataclass(frozen=True)
class Operation:
    """One call to measure: ``run(i)`` does it on input set i and returns its results, which may differ from the default
    tile's by ``tolerance``, relative in the 2-norm."""

    name: str
    run: Callable[[int], Sequence[torch.Tensor]]
    tolerance: float


def tune_head(weight: torch.Tensor | tuple[int, int], *, n_tokens: int, dtype: torch.dtype | None = None,
              device: torch.device | str = "cuda", candidates: Sequence[HeadTile] | None = None,
              output: str | Path | None = None, repeats: int = 12) -> TuneReport:
    """Measure candidate tiles for one head and batch size against the default one.

    Takes ``repeats`` x tiles x the time of about seven N·V·D products, and a few seconds of compilation per tile.
    Installs nothing: pass the file to ``load_tiles``.

    Args:
        weight: the lm_head [V, D] on the GPU, or (V, D) for random numbers.
        n_tokens: tokens N of a batch.
        dtype: of the operands; that of ``weight``, or bfloat16.
        device: where to measure, a CUDA device.
        candidates: tiles to try; None for those worked out for the chip (``kernels.config.HEAD_TILE_CANDIDATES``).
        output: JSON file that the best tile is merged into.
        repeats: calls per tile and operation, >= 3.

    Returns:
        TuneReport. A candidate that fails to run or computes something else than the default is rejected, with the
        reason.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; no GPU.
    """
    if isinstance(weight, torch.Tensor):
        check.tensor("weight", weight, ndim=2, dtypes=check.FLOAT_DTYPES)
        device, dtype = weight.device, dtype or weight.dtype
        if dtype != weight.dtype:
            raise TypeError(f"dtype must be that of weight, {weight.dtype}, got {dtype}")
    elif not isinstance(weight, Sequence) or len(weight) != 2:
        raise TypeError(f"weight must be a [V, D] tensor or (V, D), got {check.describe(weight)}")
    vocabulary, width = weight.shape if isinstance(weight, torch.Tensor) else weight
    for name, size, least in (("V of weight", vocabulary, 1), ("D of weight", width, 1), ("n_tokens", n_tokens, 1),
                              ("repeats", repeats, 3)):
        whole(name, size, least)
    device, dtype = torch.device(device), dtype or torch.bfloat16
    if dtype not in check.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if device.type != "cuda":
        raise ValueError(f"tiles are measured on a GPU: device must be a CUDA device, got {device}")
    if not torch.cuda.is_available():
        raise ValueError(f"tiles are measured on a GPU: device is {device}, and torch {torch.__version__} sees none")
    if candidates is None:
        candidates = config.HEAD_TILE_CANDIDATES.get((config.architecture(device), dtype.itemsize), ())
        if not candidates:
            raise ValueError(f"candidates must be given for {config.chip(device)} and {dtype}: none were worked out")
    given = weight if isinstance(weight, torch.Tensor) else None
    n_responses = max(n_tokens // TOKENS_PER_RESPONSE // GROUP_SIZE, 1) * GROUP_SIZE
    inputs = [SyntheticBatch.draw(vocabulary_size=vocabulary, hidden_size=width, n_tokens=n_tokens,
                                  n_responses=n_responses, group_size=GROUP_SIZE, dtype=dtype, device=device,
                                  seed=seed, weight=given) for seed in range(INPUT_SETS)]
    report = compare_tiles(candidates, head_operations(inputs), (n_tokens, vocabulary, width), dtype, device,
                           clock=_gpu_milliseconds, repeats=repeats)
    if output is not None:
        merge_tiles(output, [report.entry])
    return report


def compare_tiles(candidates: Sequence[HeadTile], operations: Sequence[Operation], shape: tuple[int, int, int],
                  dtype: torch.dtype, device: torch.device, *, clock: Callable[[Callable[[], object]], float],
                  repeats: int, input_sets: int = INPUT_SETS) -> TuneReport:
    """Reject the candidates that fail or compute something else, then time the others and the default in turns.

    ``clock`` runs a function and returns the milliseconds it took.
    """
    default = config.HEAD_TILES[config.architecture(device), dtype.itemsize]
    tiles = list(dict.fromkeys(check_tile(f"candidates[{i}]", tile) for i, tile in enumerate(candidates)))
    tiles = [default, *(tile for tile in tiles if tile != default)]
    expected = _results(default, operations, input_sets)
    rejected = {tile: _objection(tile, operations, expected) for tile in tiles[1:]}
    running = [tile for tile in tiles if rejected.get(tile) is None]
    times: dict[tuple[HeadTile, str], list[float]] = {
        (tile, operation.name): [] for tile in running for operation in operations}
    for repeat in range(repeats):
        for operation in operations:
            for tile in running:
                with config.only_tile(tile):
                    times[tile, operation.name].append(clock(partial(operation.run, repeat % input_sets)))
    timings = tuple(TileTiming(tile, tuple(statistics.median(times[tile, operation.name]) for operation in operations))
                    if tile in running else TileTiming(tile, (), rejected[tile]) for tile in tiles)
    return TuneReport(config.chip(device), config.architecture(device), dtype, shape,
                      tuple(operation.name for operation in operations), timings, repeats, _versions(),
                      datetime.datetime.now(datetime.UTC).date().isoformat())


def _results(tile: HeadTile, operations: Sequence[Operation], input_sets: int) -> list[list[torch.Tensor]]:
    with config.only_tile(tile):
        return [[result.detach().clone() for result in operation.run(i)]
                for operation in operations for i in range(input_sets)]


def _objection(tile: HeadTile, operations: Sequence[Operation], expected: list[list[torch.Tensor]]) -> str | None:
    """Why ``tile`` may not be used; None if it computes what the default does."""
    input_sets = len(expected) // len(operations)
    try:
        actual = _results(tile, operations, input_sets)
    except Exception as error:  # a compiler and a driver raise many kinds, and each disqualifies this tile only
        return f"does not run: {' '.join(str(error).split())[-160:] or type(error).__name__}"
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        operation = operations[index // input_sets]
        for mine, wanted in zip(ours, theirs, strict=True):
            off = _norm(mine.float() - wanted.float()) / max(_norm(wanted), 1e-30)
            if not off <= operation.tolerance:  # NaN included
                return f"wrong: {operation.name} differs from the default's by {off:.1e} of its norm"
    return None


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def head_operations(inputs: Sequence[SyntheticBatch], backend: str = "triton") -> list[Operation]:
    """The measured calls on ``inputs``."""
    tolerance = FP32_TOLERANCE if inputs[0].hidden.dtype == torch.float32 else HALF_TOLERANCE

    def statistics_of(index: int) -> tuple[torch.Tensor, ...]:
        batch = inputs[index]
        stats = token_stats(batch.hidden, batch.weight, batch.rollouts.tokens, backend=backend)
        columns = stats.logp, stats.lse, stats.entropy, stats.sum_p_sq, stats.score_sq
        return tuple(column for column in columns if column is not None)  # of hidden states, all are there

    def hidden_gap(index: int) -> list[torch.Tensor]:
        batch = inputs[index]
        gap = gradient_gap(batch.hidden, batch.weight, batch.rollouts, backend=backend)
        assert gap.gradients is not None  # as at every level that has vectors
        return [gap.gradients.vectors]

    def forward_and_backward(index: int) -> tuple[torch.Tensor, ...]:
        batch = inputs[index]
        hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
        logp, _ = linear_logprob(hidden, weight, batch.rollouts.tokens, backend=backend)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    return [Operation("token_stats", statistics_of, FP32_TOLERANCE),
            Operation("gradient_gap hidden", hidden_gap, tolerance),
            Operation("linear_logprob fwd+bwd", forward_and_backward, tolerance)]


def _gpu_milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _versions() -> dict[str, str]:
    import triton

    from rlvr_fast import __version__

    return {"rlvr-fast": __version__, "torch": torch.__version__, "triton": triton.__version__,
            "cuda": str(torch.version.cuda), "python": platform.python_version()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlvr_fast.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, required=True, metavar="D")
    parser.add_argument("--vocabulary-size", type=int, required=True, metavar="V")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of a batch (default: 8192)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=12, help="calls per tile and operation (default: 12)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="merge the best tile into this table")
    given = parser.parse_args(arguments)
    try:
        report = tune_head((given.vocabulary_size, given.hidden_size), n_tokens=given.tokens, dtype=DTYPES[given.dtype],
                           device=given.device, output=given.output, repeats=given.repeats)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
