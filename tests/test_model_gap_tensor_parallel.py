"""``ModelGap`` where ranks share layers (gloo): the figures of one rank with the whole model, the same bits on all.

Tolerance, of the largest inner product: float32 rounding of products in another order and of the steps before, twice
that for an entry of a Gram matrix (two coefficients are divided out); 1e-11 for the one model in float64.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gloo_ranks import Ranks
from tensor_parallel_models import FEATURES
from tensor_parallel_ranks import CASES, OTHERS, STEPS, WORLDS, alone, direction, work
from tensor_parallel_refusals import REFUSALS

from rlvr_fast.model_gap.micro_batch import spread_spans
from rlvr_fast.model_gap.sketch import Fold
from rlvr_fast.model_gap.tensor_parallel.layers import Part

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-11}
FIGURES = {"gram": 2, "norm_sq": 1, "norm_sq_naive": 1, "stderr": 1, "alignment": 1, "per parameter": 1}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Ranks]:
    """What every scenario gave on every rank; the processes run once."""
    return Ranks.run(work, tmp_path_factory.mktemp("ranks"), WORLDS)


def assert_alike(answer: dict, expected: dict, which: str) -> None:
    tolerance = TOLERANCE[FEATURES[which].get("dtype", torch.float32)]
    scale = expected["gram"].abs().max()
    for name, times in FIGURES.items():
        own, other = answer[name], expected[name]
        assert torch.equal(own.isnan(), other.isnan()), name
        unit = scale
        if name == "alignment":
            unit = (scale * sum(d.square().sum() for d in direction(which).values())).sqrt()
        error = (own - other).nan_to_num().abs().max() / unit
        assert error <= times * tolerance, f"{name}: {error:.2g}"
    for name in ("prompts", "tracked", "missing"):
        assert answer[name] == expected[name]
    assert torch.equal(answer["classes"], expected["classes"])
    assert answer["share"] == pytest.approx(expected["share"], rel=1e-5)
    assert answer["gradient norms"].keys() == expected["gradient norms"].keys()
    total = sum(expected["gradient norms"].values())
    for name, norm_sq in expected["gradient norms"].items():
        assert answer["gradient norms"][name] == pytest.approx(norm_sq, rel=3e-5, abs=1e-6 * total), name


@pytest.mark.parametrize(("count", "case"), [(count, case) for count, cases in CASES.items() for case in cases],
                         ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value))
def test_three_steps_are_those_of_one_rank(worlds, count, case):
    which, engine, method, source = case
    expected, everyone = alone(*case), worlds[count].answers(" ".join(map(str, case)))
    for step in range(STEPS):
        answers = [answer[step] for answer in everyone]
        for answer in answers:
            for name, own in answer.items():
                if isinstance(own, torch.Tensor):
                    assert torch.equal(own.nan_to_num(-7.0), answers[0][name].nan_to_num(-7.0)), name
            assert answer["missing"] == {}
            assert answer["collectives"] == (1 if engine is None else 2)  # one for each dimension of the mesh
        assert_alike(answers[0], expected[step], which)
        assert answers[0]["source"] == source
        times = 1.0 if engine is None or source == "probe" else 2.0  # coefficients are those of a rank's own loss
        assert torch.allclose(answers[0]["coefficients"], times * expected[step]["coefficients"], rtol=1e-4)
    for answer in everyone:  # "segmented" sums in another order, in training backwards
        assert answer[0]["gradient error"] <= (1e-5 if (method, source) == ("segmented", "training") else 0.0)
        assert answer[0]["restored"]
        if source == "training":
            assert answer[0]["more collectives"] == 0


@pytest.mark.parametrize(("scenario", "tolerance"), [("spread tokens", 2e-6), ("micro-batches", 2e-6),
                                                     ("one tensor-parallel rank", 2e-6), ("half precision", 5e-2)])
def test_one_step(worlds, scenario, tolerance):
    """A linear layer whose ranks see other tokens, under checkpointing; prompts split over micro-batches; one rank;
    and bfloat16, whose rounding differs between the ranks' sums and one rank's.
    """
    expected = OTHERS[scenario](spread=False)
    for answer in worlds[2].answers(scenario):
        assert answer["missing"] == {}
        assert answer["tracked"] == expected["tracked"]
        assert (answer["gram"] - expected["gram"]).abs().max() <= tolerance * expected["gram"].abs().max()


def test_what_cannot_be_seen_is_not_covered(worlds):
    heads = {"blocks.0.q_norm.weight": "its gradient is not the same on all tensor-parallel ranks"}
    tokens = {name: "Linear: each tensor-parallel rank sees a part of its tokens: use method='sketch'"
              for name in ("norm.weight", "norm.bias")}
    replaced = {"blocks.0.up.weight": "Linear: its forward was replaced by someone else (on tensor-parallel rank 1)"}
    for scenario, missing in (("local heads", heads), ("spread tokens, whole prompts", tokens),
                              ("replaced on one rank", replaced)):
        for answer in worlds[2].answers(scenario):
            assert answer["missing"].keys() == missing.keys()
            assert all(answer["missing"][name].startswith(reason) for name, reason in missing.items())


ALIKE = "every rank that shares the model's layers must measure the same responses in the same way, got rank 0: "
REFUSED = {  # what each of the two ranks raises
    "a bad argument on rank 1": ["ValueError: rank 1 refused: temperature must be positive",
                                 "ValueError: temperature must be positive, got 0.0"],
    "different options": [f"ValueError: {ALIKE}segmented size 32 seed 0"] * 2,
    "other responses": [f"ValueError: {ALIKE}segmented size 32 seed 0"] * 2,
    "a loss that says nothing": ["RuntimeError: the training backward is not that of a pure policy gradient, response "
                                 "0: its tokens have different coefficients"] * 2,
    "a problem on rank 1": ["ValueError: rank 1 refused: a second backward", "RuntimeError: a second backward"],
    "in a DistributedDataParallel of a mesh": ["ValueError: model (Embedding at embed) must not be tensor-parallel in "
                                               "a DistributedDataParallel with a device_mesh"] * 2,
    "the wrong group": ["ValueError: group must hold ranks with responses of their own, embed.weight is spread over "
                        "[0, 1], which share its layer; got [0, 1]"] * 2,
    "fully_shard over layers": ["ValueError: group must hold the ranks that blocks.0.norm1.weight is sharded over, "
                                f"[{rank}]; got [0, 1]" for rank in range(2)],
    "rows of another shard": ["ValueError: weight must hold the 15 rows [0, 15) of this rank's shard",
                              "ValueError: weight must hold the 14 rows [15, 29) of this rank's shard"],
    "two kinds of head": ["ValueError: vocabulary says which rows of the lm_head are here, a Linear of plain "
                          "tensors"] * 2,
    "parallelized too late": ["RuntimeError: embed.weight is another parameter than when the ModelGap was made"] * 2,
    "a part of the direction": ["ValueError: direction[blocks.0.q.weight] must have shape [12, 12]"] * 2,
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_rank_refuses_is_refused_by_all(worlds, case):
    for answer, expected in zip(worlds[2].answers(f"refused: {case}"), REFUSED[case], strict=True):
        assert answer.startswith(expected)


# -- without processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "bounds"), [((3, 8), [0, 8, 16, 24]), ((3, 8, 4), [0, 32, 64, 96]),
                                               ((1, 9), [0, 2, 7, 9]), ((1, 9, 4), [0, 8, 28, 36]), ((10,), [0, 3, 10]),
                                               ((10, 4), [0, 12, 40])])
def test_rows_of_a_response_on_every_rank(shape, bounds):
    """Against the rows of a tensor that says whose each is."""
    owner = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff()).view(shape)
    spans = list(pairwise(bounds))
    for dim, n in enumerate(shape):
        start = 0
        for part in owner.tensor_split(3, dim):
            here = spread_spans(spans, shape, dim, start, part.shape[dim])
            assert [part.flatten()[s:e].tolist() for s, e in here] == [
                part.flatten()[part.flatten() == i].tolist() for i in range(len(spans))]
            start += part.shape[dim]
        assert start == n


def test_rows_of_a_response_that_are_no_range():
    assert spread_spans([(0, 8), (8, 32)], (2, 16), 1, 0, 8) is None  # two responses in the first of two rows


@pytest.mark.parametrize("d", [4, 50])
def test_sketches_of_shards_add_up_to_that_of_the_whole(d):
    """Features have the hash of their number in the whole weight; four of them are kept as they are."""
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fold = Fold(d, 8, seed=3, name="w", side="out", device=x.device)
    parts = [Part("shard", (d,), (first,), (size,)) for first, size in ((0, 3), (3, d - 3))]
    shards = sum(fold.narrow(part.starts[0], part.sizes[0])(part.of(x.T).T) for part in parts)
    assert torch.allclose(shards, fold(x), rtol=0, atol=1e-14)
    assert not torch.allclose(sum(Fold(part.sizes[0], 8, seed=3, name="w", side="out", device=x.device)(part.of(x.T).T)
                                  @ torch.eye(min(part.sizes[0], 8), min(d, 8), dtype=x.dtype) for part in parts),
                              fold(x), rtol=0, atol=1e-3)
