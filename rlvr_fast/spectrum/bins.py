"""Which bin of the spectrum each prompt belongs to."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.spectrum.groups import Groups
from rlvr_fast.synthetic import whole

MEASURED = ("success_rate", "length")
MOST_BINS = 10  # of as many distinct difficulties each is a bin of its own; more are cut at quantiles
Label = float | str


def difficulties(difficulty: object, groups: Groups, sizes: Sequence[int]) -> list[Label]:
    """The difficulty of each of the P prompts: numbers, or labels.

    Args:
        difficulty: what ``difficulty_spectrum`` takes. sizes: number of prompts of each of its gaps.
    """
    if isinstance(difficulty, str):
        check.choice("difficulty", difficulty, MEASURED)
        n = groups.per_prompt(groups.n)
        if difficulty == "success_rate":
            return (groups.per_prompt(groups.n_correct) / n).tolist()
        if groups.tokens.isnan().any():
            raise ValueError("difficulty 'length' needs the response lengths: give the gap's rollouts as rollouts=")
        return (groups.per_prompt(groups.tokens) / n).tolist()
    if isinstance(difficulty, Mapping):
        missing = [identity for identity in groups.prompt_ids if identity not in difficulty]
        if missing:
            raise ValueError(f"difficulty must have a value for every prompt id, got none for {len(missing)} of "
                             f"{groups.n_prompts}, the first is {missing[0]!r}")
        return _checked([difficulty[identity] for identity in groups.prompt_ids])
    parts = [difficulty] if len(sizes) == 1 and not _is_list_of_parts(difficulty, sizes) else difficulty
    if not isinstance(parts, Sequence) or len(parts) != len(sizes):
        raise ValueError(f"difficulty must be one sequence for each of {len(sizes)} gaps, or a mapping from prompt id, "
                         f"got {check.describe(difficulty)}")
    found: dict[int, Label] = {}
    groups_prompt = iter(groups.prompt.tolist())
    for part, size in zip(parts, sizes, strict=True):
        values = part.tolist() if hasattr(part, "tolist") else part
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or len(values) != size:
            raise ValueError(f"difficulty must have one value for each of {size} prompts, got {check.describe(part)}")
        for value in _checked(values):
            prompt = next(groups_prompt)
            if found.setdefault(prompt, value) != value:
                raise ValueError(f"difficulty must be the same wherever a prompt occurs, got {found[prompt]!r} and "
                                 f"{value!r} for prompt {groups.prompt_ids[prompt]!r}: give prompts ids that name them "
                                 "(group_size= numbers them anew in every batch)")
    return _checked([found[prompt] for prompt in range(groups.n_prompts)])  # all alike in every part, too


def _is_list_of_parts(difficulty: object, sizes: Sequence[int]) -> bool:
    return (isinstance(difficulty, list | tuple) and len(difficulty) == 1 and hasattr(difficulty[0], "__len__")
            and not isinstance(difficulty[0], str))


def _checked(values: Iterable[Any]) -> list[Label]:
    """All numbers (finite, as floats or ints) or all strings."""
    values = [value.item() if hasattr(value, "item") else value for value in values]
    strings = sum(isinstance(value, str) for value in values)
    if strings not in (0, len(values)):
        raise TypeError("difficulty must be all numbers or all strings, got both")
    if not strings:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"difficulty must be finite numbers or strings, got {check.describe(value)}")
    return list(values)


def cut(values: Sequence[Label], bins: int | Sequence[float] | None
        ) -> tuple[list[int], tuple[Label, ...], list[float]]:
    """(bin of each prompt, label of each bin in order of difficulty, mean difficulty of each bin or NaN).

    Labels in order of first appearance are bins as they are. Numbers are, in ascending order, bins of their own if
    they are few, or intervals [a, b), the last one [a, b], labelled "a to b"; intervals without a prompt are left out.
    """
    texts = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if not isinstance(value, str)]
    if texts:
        if bins is not None:
            raise ValueError(f"bins must be None for difficulties that are labels, got {check.describe(bins)}")
        labels = tuple(dict.fromkeys(texts))
        return [labels.index(value) for value in texts], labels, [math.nan] * len(labels)
    distinct = sorted(set(numbers))
    if bins is None and len(distinct) <= MOST_BINS:
        return [distinct.index(value) for value in numbers], tuple(distinct), [float(value) for value in distinct]
    edges = _edges(numbers, MOST_BINS if bins is None else bins)
    index = torch.bucketize(torch.tensor(numbers, dtype=torch.float64), torch.tensor(edges[1:-1], dtype=torch.float64),
                            right=True).tolist() if numbers else []
    used = sorted(set(index))
    labels = tuple(f"{edges[which]:g} to {edges[which + 1]:g}" for which in used)
    index = [used.index(which) for which in index]
    centres = [math.fsum(value for value, own in zip(numbers, index, strict=True) if own == which) / index.count(which)
               for which in range(len(used))]
    return index, labels, centres


def _edges(values: Sequence[float], bins: int | Sequence[float]) -> list[float]:
    """Given edges, checked against the values; or quantiles for a number of bins."""
    if isinstance(bins, torch.Tensor):
        bins = bins.tolist()
    if isinstance(bins, str | bytes) or not isinstance(bins, Sequence):
        n_bins = whole("bins", bins)
        if not values:
            return [0.0, 0.0]
        cuts = torch.tensor(values, dtype=torch.float64).quantile(torch.linspace(0, 1, n_bins + 1, dtype=torch.float64))
        edges = cuts.unique().tolist()
        return edges if len(edges) > 1 else edges * 2
    edges = [check.real("bins", edge) for edge in bins]
    if len(edges) < 2 or any(right <= left for left, right in pairwise(edges)):
        raise ValueError(f"bins must be two or more rising edges, got {check.describe(bins)}")
    if values and (min(values) < edges[0] or max(values) > edges[-1]):
        raise ValueError(f"bins must span the difficulties {min(values):g} to {max(values):g}, got edges {edges[0]:g} "
                         f"to {edges[-1]:g}")
    return edges
