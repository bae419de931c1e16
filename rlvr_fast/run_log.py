"""A run's folder on disk: flat metrics step by step, and the latest detailed results, for ``rlvr-fast report``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.gap import Gap
from rlvr_fast.model_gap.interference import Interference
from rlvr_fast.spectrum import DifficultySpectrum
from rlvr_fast.whole_file import replace_file

METRICS, DETAILS = "metrics.jsonl", "details.json"
MOST_PROMPTS = 200  # of a heat map that can still be read; the ones with the largest gaps are kept
MOST_TOKENS = 20  # on either side


class RunLog:
    """Writes what ``rlvr-fast report`` reads::

        log = rf.RunLog("outputs/run")
        for step in ...:
            log.log(step, monitor.compute() | guard.metrics() | {"verdict": reading.verdict, "reason": reading.reason})
        log.detail(spectrum=rf.difficulty_spectrum(gaps, "success_rate"), interference=result.conflicts())

    A folder that exists is continued: lines are appended, and a step that is logged again overrides the earlier one.
    For one process; in a distributed run, the first rank's.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl and flush it, so that a run that dies keeps what it had.

        Args:
            step: at least 0.
            metrics: name -> number, bool, text, None, or a tensor of one element (which synchronises). NaN is written
                as null and an infinity, which a break-even may be, as the text "Infinity": the line is plain JSON.

        Raises:
            ValueError, TypeError: naming the metric, before anything is written.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an int >= 0, got {check.describe(step)}")
        if not isinstance(metrics, Mapping):
            raise TypeError(f"metrics must be a mapping from names to numbers, got {check.describe(metrics)}")
        line = json.dumps({"step": step} | {_name(name): _scalar(name, value) for name, value in metrics.items()},
                          allow_nan=False)
        path = self.folder / METRICS
        whole = not path.exists() or path.stat().st_size == 0 or _ends_a_line(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{'' if whole else chr(10)}{line}\n")

    def detail(self, *, spectrum: DifficultySpectrum | None = None, interference: Interference | None = None,
               tokens: Gap | None = None, decode: Callable[[int], str] | None = None) -> None:
        """Replace the given parts of details.json, all at once: a reader sees the old file or the new one.

        Args:
            spectrum: of ``rf.difficulty_spectrum``.
            interference: of ``ModelGapResult.conflicts``; above 200 prompts those with the largest gaps are kept.
            tokens: a gap at level "logits": its coordinates are tokens, those that set correct responses apart are
                positive. The mean over prompts is written for the 20 highest and 20 lowest tokens.
            decode: token id -> text, such as ``tokenizer.decode``; ids without it.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        parts: dict[str, object] = {}
        if spectrum is not None:
            parts["spectrum"] = _spectrum(spectrum)
        if interference is not None:
            parts["interference"] = _interference(interference)
        if tokens is not None:
            parts["tokens"] = _tokens(tokens, decode)
        path = self.folder / DETAILS
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            known = {}  # nothing of an unreadable file can be kept
        text = json.dumps((known if isinstance(known, dict) else {}) | parts, allow_nan=False)
        replace_file(path, text)

    def __repr__(self) -> str:
        return f"RunLog({str(self.folder)!r})"


def _ends_a_line(path: Path) -> bool:
    """False after a line that was cut off when an earlier process died."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _name(name: object) -> str:
    if not isinstance(name, str) or name == "step":
        raise ValueError(f"metrics must have names other than 'step', which is an argument, got {check.describe(name)}")
    return name


def _scalar(name: str, value: Any) -> object:
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        if (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1:
            raise ValueError(f"metric {name!r} must be a single number, got {check.describe(value)}")
        value = value.item()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"metric {name!r} must be a number or a text, got {check.describe(value)}")
    return _plain(value) if not (isinstance(value, float) and math.isinf(value)) else f"{'-' * (value < 0)}Infinity"


def _plain(value: object) -> object:
    """Numbers, texts and lists of them as JSON has them; other prompt ids and labels as text."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _rows(columns: Mapping[str, torch.Tensor | Iterable[object]]) -> list[dict[str, object]]:
    lists = [value.tolist() if isinstance(value, torch.Tensor) else list(value) for value in columns.values()]
    return [dict(zip(columns, map(_plain, row), strict=True)) for row in zip(*lists, strict=True)]


def _spectrum(spectrum: DifficultySpectrum) -> dict[str, object]:
    if not isinstance(spectrum, DifficultySpectrum):
        raise TypeError(f"spectrum must be a DifficultySpectrum, got {check.describe(spectrum)}")
    bins, prompts = spectrum.bins, spectrum.prompts
    shared = spectrum.has_vectors
    return {
        "estimator": spectrum.estimator, "confidence": spectrum.thresholds.confidence, "shared": shared,
        "bins": _rows({
            "bin": spectrum.labels, "prompts": bins.n_prompts, "rollouts": bins.n, "success": bins.success_rate,
            "low": bins.low, "high": bins.high, "norm_sq": bins.shared_norm_sq if shared else bins.norm_sq,
            "stderr": bins.shared_stderr if shared else bins.stderr,
            "share": bins.batch_share if shared else bins.signal_share, "verdict": bins.verdict}),
        "prompts": _rows({
            "prompt": spectrum.prompt_ids, "bin": [spectrum.labels[at] for at in prompts.bin.tolist()],
            "rollouts": prompts.n, "correct": prompts.n_correct, "low": prompts.low, "high": prompts.high,
            "norm_sq": prompts.norm_sq, "stderr": prompts.stderr, "p_adjusted": prompts.p_adjusted,
            "verdict": prompts.verdict})}


def _interference(interference: Interference) -> dict[str, object]:
    if not isinstance(interference, Interference):
        raise TypeError(f"interference must be an Interference, got {check.describe(interference)}")
    norm_sq = interference.products.diagonal().nan_to_num(nan=-math.inf)
    kept = norm_sq.argsort(descending=True)[:MOST_PROMPTS].sort().values
    summary = {name.rpartition("conflict_")[2]: _plain(value) for name, value in interference.summary().items()}
    return {"n_prompts": len(interference.prompt_ids), "summary": summary,
            "prompts": [_plain(interference.prompt_ids[at]) for at in kept.tolist()],
            "cosine": _plain(interference.cosine[kept][:, kept].tolist()),
            "worst": [_plain_dict(conflict._asdict()) for conflict in interference.worst(10)]}


def _plain_dict(row: Mapping[str, object]) -> dict[str, object]:
    return {name: _plain(value) for name, value in row.items()}


def _tokens(gap: Gap, decode: Callable[[int], str] | None) -> dict[str, object]:
    """Mean over prompts of the gap's coordinate for each token [derived], with its standard error over prompts."""
    if not isinstance(gap, Gap):
        raise TypeError(f"tokens must be a Gap, got {check.describe(gap)}")
    if gap.level != "logits" or gap.vocabulary is not None:
        raise ValueError(f"tokens must be a gap at level 'logits' over the whole vocabulary, got level {gap.level!r}"
                         f"{' of a shard' if gap.vocabulary is not None else ''}")
    assert gap.vector is not None  # as at every level but "head"
    vectors = gap.vector[gap.defined].double()
    n = len(vectors)
    if n == 0:
        return {"n_prompts": 0, "rows": []}
    mean, order = vectors.mean(0), vectors.mean(0).argsort(descending=True)
    stderr = vectors.std(0) / math.sqrt(n) if n > 1 else torch.full_like(mean, math.nan)
    most = min(MOST_TOKENS, len(order) // 2)
    chosen = torch.cat([order[:most], order[len(order) - most:]])
    names = [decode(token) if decode else str(token) for token in chosen.tolist()]
    return {"n_prompts": n, "rows": _rows({"token": names, "id": chosen, "score": mean[chosen],
                                           "stderr": stderr[chosen]})}
