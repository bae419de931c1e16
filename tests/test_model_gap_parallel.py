"""``ModelGap`` over real ranks (gloo): the figures of one process, the same bits on all, and gradients untouched."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from gloo_ranks import Ranks
from model_gap_problems import OWNERS, direction, problem, shares
from model_gap_ranks import CASES, FEATURES, STEPS, WORLDS, alone, work
from model_gap_refusals import REFUSALS

import rlvr_fast as rf
from rlvr_fast.model_gap.parallel import WORDS_BYTES

TOLERANCE = 1e-6  # of the largest inner product: float32 rounding, of sums in another order and of the steps before
# An entry of a Gram matrix has twice the rounding of a coefficient that was read off its own logits.
FIGURES = {"gram": 2, "norm_sq": 1, "norm_sq_naive": 1, "stderr": 1, "alignment": 1, "per parameter": 1}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Ranks]:
    """What every scenario gave on every rank; the processes run once."""
    return Ranks.run(work, tmp_path_factory.mktemp("ranks"), WORLDS)


def assert_same_bits(answers: list[dict]) -> None:
    for answer in answers[1:]:
        for name in answer.keys() - {"gradient error"}:
            own, first = answer[name], answers[0][name]
            if isinstance(own, torch.Tensor):
                assert torch.equal(own.nan_to_num(-7.0), first.nan_to_num(-7.0)), name
            else:
                assert own == first, name


def assert_alike(answer: dict, expected: dict) -> None:
    scale = expected["gram"].abs().max()
    for name, times in FIGURES.items():
        own, other = answer[name], expected[name]
        assert torch.equal(own.isnan(), other.isnan()), name
        unit = scale if name != "alignment" else (scale * sum(d.square().sum() for d in direction().values())).sqrt()
        error = (own - other).nan_to_num().abs().max() / unit
        assert error <= times * TOLERANCE, f"{name}: {error:.2g}"
    for name in ("prompts", "tracked", "missing"):
        assert answer[name] == expected[name]
    assert torch.equal(answer["classes"], expected["classes"])
    assert answer["gradient norms"].keys() == expected["gradient norms"].keys()
    assert answer["share"] == pytest.approx(expected["share"], rel=1e-5)
    total = sum(expected["gradient norms"].values())
    for name, norm_sq in expected["gradient norms"].items():
        assert answer["gradient norms"][name] == pytest.approx(norm_sq, rel=1e-5, abs=TOLERANCE * total)


@pytest.mark.parametrize(("count", "engine", "method", "source"),
                         [(count, *case) for count, cases in CASES.items() for case in cases])
def test_three_steps_are_those_of_one_process(worlds, count, engine, method, source):
    """Were a state reduced instead of a step's increment, the second and third step would be off."""
    expected = alone(method, source, count, engine)
    everyone = worlds[count].answers(f"{engine} {method} {source}")
    for step in range(STEPS):
        answers = [answer[step] for answer in everyone]
        assert_same_bits(answers)
        assert_alike(answers[0], expected[step])
        assert answers[0]["source"] == source
        coefficients = torch.ones(12, dtype=torch.float64)
        if source == "training":  # of each rank's own loss
            coefficients = count * expected[step]["coefficients"]
        assert torch.allclose(answers[0]["coefficients"], coefficients, rtol=1e-4)
        for answer in answers:  # "segmented" sums in another order, in training backwards
            assert answer["gradient error"] <= (1e-5 if (method, source) == ("segmented", "training") else 0.0)
    assert not torch.equal(expected[0]["gram"], expected[1]["gram"])


@pytest.mark.parametrize("count", [2, 3])
def test_one_collective_a_step_of_a_known_size(worlds, count):
    """The rank with most data: R responses with figures of every parameter, at most 0.3 kB of facts, 4 kB for words."""
    parameters = dict(zoo.build(**FEATURES["ddp"]).named_parameters())
    sketch = sum(min(25, len(p)) if p.ndim == 1 else min(5, p.shape[0]) * min(5, p.shape[1])
                 for p in parameters.values())
    for method in ("segmented", "sketch"):
        bytes_of = []
        for rows in shares(method, count):
            longest = max(sum(OWNERS[i] == prompt for i in rows) for prompt in range(3))
            a_response = 4 * sketch if method == "sketch" else 8 * longest * len(parameters)
            bytes_of.append(len(rows) * (a_response + 8 * (1 + 2) + 1) + 9 * len(parameters) + WORDS_BYTES)
        for answer in worlds[count].answers(f"ddp {method} training"):
            assert [step["collectives"] for step in answer] == [1] * STEPS
            assert 0 <= answer[0]["bytes"] - max(bytes_of) < 300


@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_without_synchronisation(worlds, count):
    answers = worlds[count].answers("accumulated")
    assert_same_bits(answers)
    assert_alike(answers[0], alone("sketch", "training", count)[0])


@pytest.mark.parametrize("count", [2, 3])
def test_without_a_group_nothing_is_said(worlds, count):
    whole, answers = alone("segmented", "training", count)[0]["gram"], worlds[count].answers("local")
    assert all(answer["messages"] == 0 for answer in answers)
    found = torch.cat([gram.flatten() for answer in answers for gram in answer["gram"] if gram is not None])
    assert (found - whole).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("count", [2, 3])
def test_a_layer_that_one_rank_cannot_see_is_covered_on_none(worlds, count):
    reason = f"Linear: its forward was replaced by someone else (on rank {count - 1})"
    for answer in worlds[count].answers("untracked"):
        assert answer == {"missing": {"blocks.0.o.weight": reason}, "others": 1}


@pytest.mark.parametrize("count", [2, 3])
def test_exact_without_an_engine(worlds, count):
    """Nobody averages here: the norms in ``coverage`` are the means of the ranks' own."""
    answers = worlds[count].answers("no engine")
    own = [answer.pop("own gradient norms") for answer in answers]
    assert_same_bits(answers)
    for name, norm_sq in answers[0].pop("gradient norms").items():
        assert norm_sq == pytest.approx(sum(norms[name] for norms in own) / count, rel=1e-5)
    expected = alone("exact", "probe", count)[0]
    answers[0]["gradient norms"] = expected["gradient norms"]
    assert_alike(answers[0], expected)


def test_a_reducer_that_looks_for_unused_parameters(worlds):
    for answer in worlds[2].answers("unused parameters"):
        for step, expected in zip(answer, alone("segmented", "training", 2), strict=True):
            assert_alike(step, expected)


def test_shards_that_a_forward_left_gathered(worlds):
    answers = worlds[2].answers("left gathered")
    assert_same_bits(answers)
    assert_alike(answers[0], alone("segmented", "training", 2, "sharded")[0])


REFUSED = {  # what each of two ranks raises
    "a prompt on several ranks": ["ValueError: a prompt's responses must be on one rank, or method='sketch'; prompt "
                                  "'prompt 0' has some on ranks 0 and 1"] * 2,
    "a bad argument on rank 0": ["ValueError: temperature must be positive, got 0.0",
                                 "ValueError: rank 0 refused: temperature must be positive"],
    "different options": ["ValueError: every rank of the group must measure the same model in the same way, got "
                          "rank 0: sketch size 32 seed 0"] * 2,
    "a loss that says nothing on the last rank": ["ValueError: rank 1 refused: the training backward is not that of a",
                                                  "RuntimeError: the training backward is not that of a pure policy"],
    "a response without gradient": ["RuntimeError: prompt 'prompt 0' has both classes, but response 0 has coefficient "
                                    "0"] * 2,
    "fully_shard without a group": ["ValueError: group must hold the ranks that embed.weight is sharded over, [0, 1]; "
                                    "got None"] * 2,
    "exact in an engine": ["ValueError: method 'exact' runs a backward per response"] * 2,
    "an engine inside": ["ValueError: model (DistributedDataParallel at 0) must not be wrapped by a distributed"] * 2,
    "mixed precision": ["ValueError: model must be in a DistributedDataParallel without mixed_precision"] * 2,
    "a sharded direction": ["TypeError: direction[norm.weight] must be a plain tensor of the whole shape"] * 2,
    "prompts counted from 0 on both ranks": ["ValueError: prompts of different ranks must have different prompt_ids, "
                                             "got prompts counted from 0 on each of the ranks 0, 1, as group_size"] * 2,
    "tensor parallel inside the context": ["ValueError: lm_head.weight must be a plain tensor while its layer"] * 2,
    "no group": ["TypeError: group must be a torch.distributed.ProcessGroup of which this rank is a member"] * 2,
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_one_rank_refuses_is_refused_by_all(worlds, case):
    for answer, expected in zip(worlds[2].answers(f"refused: {case}"), REFUSED[case], strict=True):
        assert answer.startswith(expected)


def test_a_group_without_torch_distributed():
    part, _ = problem(0, range(4))
    with pytest.raises(ValueError, match=r"group needs torch\.distributed"):
        rf.ModelGap(zoo.build(), part.rollouts, group="any")
