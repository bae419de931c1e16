"""Rollouts: whatever layout a batch comes in, the same object; pack and unpack; and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import random_rollouts

from rlvr_fast import Rollouts

RESPONSES = ([5, 6, 7], [], [8], [9, 1, 2, 3], [4, 4])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
PROMPTS = ["b", "a", "b", "c", "a"]
TOKENS = [token for response in RESPONSES for token in response]
COLUMNS = {"left": lambda n: range(6 - n, 6), "right": lambda n: range(n), "holes": lambda n: (0, 2, 3, 5)[:n]}


def padded(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The responses in a [5, 6] batch whose padding holds a token id that no response has."""
    ids, mask = torch.full((5, 6), 77), torch.zeros(5, 6, dtype=torch.bool)
    for row, response in enumerate(RESPONSES):
        columns = list(COLUMNS[layout](len(response)))
        ids[row, columns] = torch.tensor(response, dtype=torch.int64)
        mask[row, columns] = True
    return ids, mask


def build(layout: str, **options) -> Rollouts:
    if not options:
        options = {"prompt_ids": PROMPTS}
    if layout == "packed":
        return Rollouts.from_packed(torch.tensor(TOKENS), torch.tensor([0, 3, 3, 4, 8, 10]), REWARDS, **options)
    if layout == "packed with prompts":  # two prompt tokens, labelled -100, before each response
        labels = torch.tensor([label for response in RESPONSES for label in (-100, -100, *response)])
        return Rollouts.from_packed(labels, torch.tensor([0, 5, 7, 10, 16, 20]), REWARDS, **options)
    ids, mask = padded(layout.removesuffix(" labels"))
    if layout.endswith(" labels"):
        return Rollouts.from_padded(ids.masked_fill(~mask, -100), None, REWARDS, **options)
    return Rollouts.from_padded(ids, mask, REWARDS, **options)


LAYOUTS = ("left", "right", "holes", "left labels", "right labels", "holes labels", "packed", "packed with prompts")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rollouts(layout):
    rollouts = build(layout)
    assert rollouts.tokens.tolist() == TOKENS
    assert rollouts.cu_seqlens.tolist() == [0, 3, 3, 4, 8, 10]
    assert rollouts.bounds == (0, 3, 3, 4, 8, 10)
    assert rollouts.lengths.tolist() == [3, 0, 1, 4, 2]
    assert rollouts.response_index.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 4, 4]
    assert rollouts.rewards.tolist() == REWARDS.tolist()
    assert rollouts.correct.tolist() == [True, False, False, True, True]
    assert rollouts.prompt_ids == ("b", "a", "c")
    assert rollouts.prompt_index.tolist() == [0, 1, 0, 2, 1]
    assert rollouts.members == ((0, 2), (1, 4), (3,))
    assert rollouts.vocabulary_range == (1, 9)
    assert (rollouts.n_tokens, rollouts.n_responses, rollouts.n_prompts) == (10, 5, 3)
    for tensor, dtype in ((rollouts.tokens, torch.int64), (rollouts.cu_seqlens, torch.int64),
                          (rollouts.rewards, torch.float32), (rollouts.correct, torch.bool),
                          (rollouts.prompt_index, torch.int64), (rollouts.lengths, torch.int64)):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()


def test_mask_and_labels_both_take_tokens_out():
    ids = torch.tensor([[1, -100, 3, 4]])
    rollouts = Rollouts.from_padded(ids, torch.tensor([[1, 1, 0, 1]]), torch.tensor([1.0]), group_size=1)
    assert rollouts.tokens.tolist() == [1, 4]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_mask_dtypes(dtype):
    ids, mask = padded("left")
    rollouts = Rollouts.from_padded(ids.int(), mask.to(dtype), REWARDS, prompt_ids=PROMPTS)
    assert rollouts.tokens.tolist() == TOKENS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
def test_unpack_then_pack_is_the_identity(layout, tail, generator):
    rollouts = build(layout)
    x = torch.randn(rollouts.n_tokens, *tail, generator=generator)
    assert torch.equal(rollouts.pack(rollouts.unpack(x)), x)
    assert torch.equal(rollouts.pack(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_takes_the_rows_of_the_tokens_and_unpack_puts_them_back(layout, generator):
    rollouts = build(layout)
    packed = layout.startswith("packed")
    shape = (20 if "prompts" in layout else 10,) if packed else (5, 6)
    x = torch.randn(*shape, 4, generator=generator)
    ids = rollouts.unpack(rollouts.tokens, fill=-100)
    assert ids.shape == shape
    assert torch.equal(rollouts.pack(x), x[ids != -100])  # boolean indexing reads in row-major order
    unpacked = rollouts.unpack(rollouts.pack(x), fill=-7.0)
    assert torch.equal(unpacked, torch.where((ids != -100)[..., None], x, torch.tensor(-7.0)))


def test_pack_of_padding_never_looks_at_its_values():
    _, mask = padded("holes")
    x = torch.where(mask, 1.0, torch.nan)
    assert build("holes").pack(x).tolist() == [1.0] * len(TOKENS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack_are_differentiable(layout, generator):
    rollouts = build(layout)
    x = torch.zeros_like(rollouts.unpack(torch.zeros(10, 2))).requires_grad_()
    upstream = torch.randn(10, 2, generator=generator)
    (rollouts.pack(x) * upstream).sum().backward()
    assert torch.equal(x.grad, rollouts.unpack(upstream))
    y = torch.zeros(10, 2, requires_grad=True)
    (rollouts.unpack(y) * x.grad).sum().backward()
    assert torch.equal(y.grad, upstream)


@given(st.data())
def test_padded_and_packed_agree_on_random_batches(data):
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 6))
    flat = data.draw(st.lists(st.integers(0, 50), min_size=rows * columns, max_size=rows * columns))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    ids = torch.tensor(flat, dtype=torch.int64).view(rows, columns)
    mask = torch.tensor(bits, dtype=torch.bool).view(rows, columns)
    rewards, prompts = torch.zeros(rows), data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    one = Rollouts.from_padded(ids, mask, rewards, prompt_ids=prompts)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    two = Rollouts.from_packed(ids[mask], ends, rewards, prompts)
    for name in ("tokens", "cu_seqlens", "lengths", "rewards", "correct", "prompt_index"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert (one.members, one.prompt_ids, one.bounds) == (two.members, two.prompt_ids, two.bounds)
    assert torch.equal(one.unpack(one.tokens, fill=-1), ids.masked_fill(~mask, -1))


# -- prompts and classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [torch.tensor([7, 3, 7, 9, 3]), [7, 3, 7, 9, 3], (7, 3, 7, 9, 3),
                                 np.array([7, 3, 7, 9, 3])], ids=["tensor", "list", "tuple", "array"])
def test_integer_prompt_ids(ids):
    rollouts = build("left", prompt_ids=ids)
    assert rollouts.prompt_ids == (7, 3, 9)
    assert rollouts.prompt_index.tolist() == [0, 1, 0, 2, 1]


@pytest.mark.parametrize("ids", [PROMPTS, np.array(PROMPTS, dtype=object), np.array(PROMPTS)],
                         ids=["list", "object array", "string array"])
def test_string_prompt_ids(ids):
    """The numpy object array is what verl calls ``uid``."""
    rollouts = build("left", prompt_ids=ids)
    assert rollouts.prompt_ids == ("b", "a", "c")
    assert all(type(identity) is str for identity in rollouts.prompt_ids)


def test_group_size():
    rollouts = Rollouts.from_padded(torch.ones(6, 2, dtype=torch.int64), None, torch.zeros(6), group_size=3)
    assert rollouts.prompt_ids == (0, 1)
    assert rollouts.members == ((0, 1, 2), (3, 4, 5))
    assert build("packed", group_size=5).members == ((0, 1, 2, 3, 4),)
    assert build("packed", group_size=1).n_prompts == 5


def test_threshold_and_correct_split_rewards_that_are_not_binary():
    rewards = torch.tensor([0.2, -1.0, 0.7, 3.0], dtype=torch.float64)
    ids = torch.ones(4, 2, dtype=torch.int64)
    by_threshold = Rollouts.from_padded(ids, None, rewards, group_size=2, threshold=0.7)
    assert by_threshold.correct.tolist() == [False, False, True, True]
    assert by_threshold.rewards.tolist() == rewards.float().tolist()
    for verdict in (torch.tensor([1, 0, 0, 1]), torch.tensor([True, False, False, True]), torch.tensor([1.0, 0, 0, 1])):
        named = Rollouts.from_padded(ids, None, rewards, group_size=2, correct=verdict)
        assert named.correct.tolist() == [True, False, False, True]


@pytest.mark.parametrize("rewards", [torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0]).half(),
                                     torch.tensor([1.0, 0.0], requires_grad=True)])
def test_reward_dtypes(rewards):
    rollouts = Rollouts.from_padded(torch.ones(2, 1, dtype=torch.int64), None, rewards, group_size=2)
    assert rollouts.correct.tolist() == [True, False]
    assert rollouts.rewards.dtype == torch.float32
    assert not rollouts.rewards.requires_grad


# -- the object -------------------------------------------------------------------------------------------------------


def test_rollouts_cannot_be_assigned_to_and_do_not_alias_their_inputs():
    ids, mask = padded("left")
    rewards, verdict = REWARDS.clone(), REWARDS.clone().bool()
    rollouts = Rollouts.from_padded(ids, mask, rewards, prompt_ids=PROMPTS, correct=verdict)
    tokens, ends = torch.tensor([1, 2]), torch.tensor([0, 2])
    packed = Rollouts.from_packed(tokens, ends, rewards[:1], group_size=1)
    for source in (ids, mask, rewards, verdict, tokens, ends):
        source.zero_()
    assert rollouts.tokens.tolist() == TOKENS
    assert rollouts.rewards.tolist() == REWARDS.tolist()
    assert rollouts.correct.tolist() == REWARDS.bool().tolist()
    assert (packed.tokens.tolist(), packed.cu_seqlens.tolist()) == ([1, 2], [0, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollouts.rewards = torch.zeros(5)


def test_to_device_keeps_everything(device):
    rollouts = build("left")
    moved = rollouts.to(device)
    assert moved.device.type == device.type
    assert moved.members == rollouts.members
    assert moved.tokens.tolist() == rollouts.tokens.tolist()
    assert moved.lengths.device == moved.tokens.device
    x = torch.arange(30, device=device).view(5, 6)
    assert moved.pack(x).tolist() == rollouts.pack(x.cpu()).tolist()


def test_repr_says_what_the_batch_is():
    text = repr(build("left"))
    for part in ("prompts=3: 2 mixed, 1 solved, 0 failed", "responses=5", "success=0.600", "tokens=10", "length=0..4"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("empty", [
    lambda: Rollouts.from_padded(torch.zeros(0, 4, dtype=torch.int64), None, torch.zeros(0), group_size=4),
    lambda: Rollouts.from_padded(torch.zeros(0, 0, dtype=torch.int64), None, torch.zeros(0), prompt_ids=[]),
    lambda: Rollouts.from_packed(torch.zeros(0, dtype=torch.int64), torch.tensor([0]), torch.zeros(0), []),
])
def test_a_batch_without_responses(empty):
    rollouts = empty()
    assert (rollouts.n_tokens, rollouts.n_responses, rollouts.n_prompts) == (0, 0, 0)
    assert rollouts.vocabulary_range == (0, -1)
    assert rollouts.pack(torch.zeros(0, 3)).shape == (0, 3)
    assert "responses=0" in repr(rollouts)


def test_a_batch_of_empty_responses():
    rollouts = Rollouts.from_padded(torch.full((2, 3), -100), None, torch.tensor([1.0, 0.0]), group_size=2)
    assert rollouts.lengths.tolist() == [0, 0]
    assert rollouts.pack(torch.ones(2, 3, 5)).shape == (0, 5)
    assert rollouts.unpack(torch.zeros(0), fill=2.0).tolist() == [[2.0] * 3] * 2
    assert "length=0..0" in repr(rollouts)


def test_random_batches_are_internally_consistent(generator):
    rollouts = random_rollouts(50, 7, 100, generator)
    assert sorted(i for members in rollouts.members for i in members) == list(range(50))
    for prompt, members in enumerate(rollouts.members):
        assert (rollouts.prompt_index[list(members)] == prompt).all()
    assert torch.equal(rollouts.lengths.cumsum(0), rollouts.cu_seqlens[1:])


# -- what it refuses --------------------------------------------------------------------------------------------------

IDS, MASK = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.bool)
ENDS = torch.tensor([0, 3, 6, 9, 12])
BINARY = torch.tensor([1.0, 0.0, 0.0, 1.0])


def from_padded(ids=IDS, mask=MASK, rewards=BINARY, **options):
    return Rollouts.from_padded(ids, mask, rewards, **(options or {"group_size": 2}))


def from_packed(tokens=None, ends=ENDS, rewards=BINARY, **options):
    tokens = torch.ones(12, dtype=torch.int64) if tokens is None else tokens
    return Rollouts.from_packed(tokens, ends, rewards, **(options or {"group_size": 2}))


REFUSED = {
    "ids not a tensor": (lambda: from_padded([[1]]), TypeError, "completion_ids must be a torch.Tensor, got list"),
    "ids float": (lambda: from_padded(IDS.float()), TypeError, "completion_ids must have dtype .*float32"),
    "ids one-dimensional": (lambda: from_padded(IDS[0]), ValueError, r"completion_ids must have 2 .* \[3\]"),
    "ids negative": (lambda: from_padded(-IDS), ValueError, "completion_ids must be token ids >= 0 .*-1"),
    "mask not a tensor": (lambda: from_padded(mask=[[1]]), TypeError, "completion_mask must be a torch.Tensor"),
    "mask shape": (lambda: from_padded(mask=MASK[:, :2]), ValueError, r"completion_mask must have shape \[4, 3\]"),
    "mask device": (lambda: from_padded(mask=MASK.to("meta")), ValueError, "completion_mask must be on cpu"),
    "mask values": (lambda: from_padded(mask=2 * MASK.long()), ValueError, "completion_mask must hold only 0 and 1"),
    "mask NaN": (lambda: from_padded(mask=MASK * torch.nan), ValueError, "completion_mask must hold only 0 and 1"),
    "rewards not a tensor": (lambda: from_padded(rewards=[1, 0, 0, 1]), TypeError, "rewards must be a torch.Tensor"),
    "rewards shape": (lambda: from_padded(rewards=BINARY[:3]), ValueError, r"rewards must have shape \[4\]"),
    "rewards per token": (lambda: from_padded(rewards=MASK.float()), ValueError, r"rewards must have shape \[4\]"),
    "rewards device": (lambda: from_padded(rewards=BINARY.to("meta")), ValueError, "rewards must be on cpu"),
    "rewards NaN": (lambda: from_padded(rewards=torch.tensor([0, 1, torch.nan, 0])), ValueError,
                    "rewards must be finite, got nan for response 2"),
    "rewards infinite": (lambda: from_padded(rewards=torch.tensor([0, 1, torch.inf, 0]), group_size=2, threshold=0.5),
                         ValueError, "rewards must be finite, got inf"),
    "rewards complex": (lambda: from_padded(rewards=BINARY * 1j), TypeError, "rewards must be real"),
    "rewards not binary": (lambda: from_padded(rewards=BINARY / 2), ValueError, "rewards must be 0 or 1, got 0.5.*"
                           "correct= or threshold="),
    "correct and threshold": (lambda: from_padded(group_size=2, correct=BINARY, threshold=1), ValueError,
                              "correct and threshold"),
    "correct shape": (lambda: from_padded(group_size=2, correct=BINARY[:2]), ValueError, r"correct must have shape"),
    "correct not a tensor": (lambda: from_padded(group_size=2, correct=[1, 0, 0, 1]), TypeError, "correct must be a"),
    "correct values": (lambda: from_padded(group_size=2, correct=BINARY / 2), ValueError, "correct must hold only 0"),
    "threshold NaN": (lambda: from_padded(group_size=2, threshold=float("nan")), ValueError, "threshold must be fin"),
    "threshold text": (lambda: from_padded(group_size=2, threshold="half"), TypeError, "threshold must be a number"),
    "no grouping": (lambda: from_padded(correct=BINARY), ValueError, "exactly one of group_size and prompt_ids"),
    "two groupings": (lambda: from_padded(group_size=2, prompt_ids=[0] * 4), ValueError, "exactly one of group_size"),
    "group_size zero": (lambda: from_padded(group_size=0), ValueError, "group_size must be >= 1"),
    "group_size negative": (lambda: from_padded(group_size=-2), ValueError, "group_size must be >= 1"),
    "group_size uneven": (lambda: from_padded(group_size=3), ValueError, "group_size .* divide .* 3 for 4"),
    "group_size float": (lambda: from_padded(group_size=2.0), TypeError, "group_size must be an int, got 2.0"),
    "group_size bool": (lambda: from_padded(group_size=True), TypeError, "group_size must be an int"),
    "prompt_ids number": (lambda: from_padded(prompt_ids=["a"]), ValueError, "prompt_ids .* got 1 for 4"),
    "prompt_ids text": (lambda: from_padded(prompt_ids="abcd"), TypeError, "prompt_ids must be a tensor or a sequence"),
    "prompt_ids iterator": (lambda: from_padded(prompt_ids=iter("abcd")), TypeError, "prompt_ids must be a tensor or"),
    "prompt_ids set": (lambda: from_padded(prompt_ids={"a", "b", "c", "d"}), TypeError, "prompt_ids must be a tensor"),
    "prompt_ids unhashable": (lambda: from_padded(prompt_ids=[[1], [1], [2], [2]]), TypeError, "prompt_ids .*hashable"),
    "prompt_ids float": (lambda: from_padded(prompt_ids=BINARY), TypeError, "prompt_ids must have dtype"),
    "prompt_ids shape": (lambda: from_padded(prompt_ids=IDS), ValueError, r"prompt_ids must have shape \[4\]"),
    "tokens two-dimensional": (lambda: from_packed(IDS), ValueError, r"tokens must have 1 .* \[4, 3\]"),
    "tokens float": (lambda: from_packed(torch.ones(12)), TypeError, "tokens must have dtype"),
    "tokens negative": (lambda: from_packed(torch.full((12,), -5)), ValueError, "tokens must be token ids >= 0.*-5"),
    "ends not a tensor": (lambda: from_packed(ends=[0, 12]), TypeError, "cu_seqlens must be a torch.Tensor"),
    "ends float": (lambda: from_packed(ends=ENDS.float()), TypeError, "cu_seqlens must have dtype"),
    "ends empty": (lambda: from_packed(ends=ENDS[:0]), ValueError, "cu_seqlens must run from 0 .*nothing"),
    "ends start": (lambda: from_packed(ends=ENDS + 1), ValueError, "cu_seqlens must run from 0 .* got 1 to 13"),
    "ends stop": (lambda: from_packed(ends=ENDS[:-1]), ValueError, "cu_seqlens must run from 0 to .* 12, got 0 to 9"),
    "ends decrease": (lambda: from_packed(ends=torch.tensor([0, 6, 3, 9, 12])), ValueError, "cu_seqlens .* decrease"),
    "ends and rewards": (lambda: from_packed(rewards=BINARY[:2]), ValueError, r"rewards must have shape \[4\]"),
    "pack not a tensor": (lambda: from_padded().pack([1.0]), TypeError, "x must be a torch.Tensor"),
    "pack shape": (lambda: from_padded().pack(torch.ones(4, 2)), ValueError, r"x must start with \[4, 3\] .*\[12\]"),
    "pack scalar": (lambda: from_padded().pack(torch.ones(())), ValueError, "x must start with"),
    "pack device": (lambda: from_padded().pack(torch.ones(4, 3, device="meta")), ValueError, "x must be on cpu"),
    "pack named": (lambda: from_padded().pack(torch.ones(7), "hidden"), ValueError, "hidden must start with"),
    "unpack shape": (lambda: from_padded().unpack(torch.ones(11)), ValueError, "x must have 12 rows"),
    "unpack scalar": (lambda: from_padded().unpack(torch.ones(())), ValueError, "x must have 12 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
