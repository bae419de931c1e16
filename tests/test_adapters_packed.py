"""Packed micro-batches give a monitor what padded ones give it, however they say where sequences begin."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from adapter_packs import PADDING, Pack, centred_step, halves
from monitor_ranks import GROUP_SIZE, Step, monitor, without_time

import rlvr_fast as rf
from rlvr_fast.integrations import packed

FLOAT32 = {"rel": 1e-5, "abs": 1e-6}  # log-probs are packed in float32, sums are float64


@pytest.fixture
def step() -> Step:
    return centred_step()


def padded(step: Step, *, ids: bool = True, **options) -> dict[str, float]:
    """What the same responses give in one padded batch."""
    own = monitor(estimator="dr_grpo", **options)
    verdict = {"correct": step.correct, "prompt_ids": step.prompt_ids} if ids else {}
    own.update(mask=step.mask, logp=step.logp, old_logp=step.old_logp, advantages=step.advantages, **verdict)
    return without_time(own.compute())


def verdicts_of(step: Step) -> dict[str, list[bool]]:
    """The verdicts of each prompt's responses."""
    verdicts: dict[str, list[bool]] = {}
    for name, correct in zip(step.prompt_ids, step.correct.tolist(), strict=True):
        verdicts.setdefault(name, []).append(correct)
    return verdicts


def borders_of(pack: Pack, name: str):
    if name == "seq_lens":
        return pack.seq_lens
    if name == "cu_seqlens":
        return torch.tensor([0, *accumulate(pack.seq_lens)])
    return getattr(pack, name)


@pytest.mark.parametrize("name", ["seq_lens", "cu_seqlens", "position_ids", "document_ids"])
def test_a_pack_is_the_padded_batch_of_its_responses(step, name):
    own = monitor(estimator="dr_grpo")
    pack = Pack.of(step, list(range(len(step.prompt_ids))))
    assert packed.update(own, **pack.tokens, **pack.truth, **{name: borders_of(pack, name)}) == len(step.prompt_ids)
    expected = padded(step)
    assert without_time(own.compute()) == pytest.approx(expected, **FLOAT32)
    assert {"rlvr/group/p_mean", "rlvr/logp/gap", "rlvr/ratio/ess", "rlvr/gap/kappa"} <= expected.keys()


def test_a_list_of_samples_needs_no_borders(step):
    own = monitor(estimator="dr_grpo")
    pack = Pack.of(step, list(range(len(step.prompt_ids))), padding=0)
    lists = {name: pack.split(name) for name in (*pack.tokens, *pack.truth)}
    packed.update(own, **lists)
    assert without_time(own.compute()) == pytest.approx(padded(step), **FLOAT32)


def test_groups_torn_over_micro_batches_are_put_together(step):
    own = monitor(estimator="dr_grpo")
    for rows in halves(step):
        pack = Pack.of(step, rows)
        packed.update(own, **pack.tokens, **pack.truth, position_ids=pack.position_ids)
    assert without_time(own.compute()) == pytest.approx(padded(step), **FLOAT32)


def test_two_packs_in_the_rows_of_one_batch(step):
    """As open-instruct collates them: rows of one length, padded, each with documents numbered from 1."""
    own = monitor(estimator="dr_grpo")
    left, right = (Pack.of(step, rows, padding=0) for rows in halves(step))
    width = max(left.mask.shape[1], right.mask.shape[1]) + PADDING
    fills = {"logp": torch.nan, "old_logp": torch.nan, "mask": False}

    def stack(name: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(getattr(one, name).float(), (0, width - one.mask.shape[1]),
                                                  value=float(fills.get(name, 0))).to(getattr(one, name).dtype)
                          for one in (left, right)])

    names = (*left.tokens, *left.truth, "document_ids")
    assert packed.update(own, **{name: stack(name) for name in names}) == len(step.prompt_ids)
    assert without_time(own.compute()) == pytest.approx(padded(step), **FLOAT32)


def test_without_ids_class_and_success_rate_come_from_advantages(step):
    own = monitor(estimator="dr_grpo", group_size=GROUP_SIZE)
    for rows in halves(step):
        pack = Pack.of(step, rows)
        packed.update(own, **pack.tokens, advantages=pack.advantages, seq_lens=pack.seq_lens)
    found = without_time(own.compute())
    known = padded(step)
    for key in ("rlvr/group/frac_mixed", "rlvr/logp/gap", "rlvr/length/bias_index", "rlvr/gap/kappa"):
        assert found[key] == pytest.approx(known[key], **FLOAT32)
    rates = [sum(own) / GROUP_SIZE for own in verdicts_of(step).values()]
    mixed = [rate for rate in rates if 0 < rate < 1]
    assert found["rlvr/group/p_mixed"] == pytest.approx(sum(mixed) / len(mixed))
    assert not {"rlvr/group/frac_solved", "rlvr/group/frac_failed"} & found.keys()  # a zero does not say which


def test_the_first_and_the_last_token_of_a_sequence_are_its_own():
    own = monitor()
    packed.update(own, mask=torch.ones(5), seq_lens=torch.tensor([2, 3]), logp=torch.tensor([-1.0, -2, -4, -8, -16]),
                  rewards=[1.0, 0.0], prompt_ids=["a", "a"])
    found = own.compute()
    assert found["rlvr/logp/token"] == pytest.approx(-31 / 5)
    assert found["rlvr/logp/gap"] == pytest.approx(-3 / 2 + 28 / 3)
    assert found["rlvr/length/bias_index"] == pytest.approx(1 / 5)


def test_a_row_is_a_border_whatever_its_documents_are_called():
    own = monitor()
    n = packed.update(own, mask=torch.ones(2, 3), document_ids=torch.ones(2, 3), rewards=[1.0, 0.0],
                      prompt_ids=["a", "a"])
    assert n == 2
    assert own.compute()["rlvr/length/mean"] == 3


def test_a_sequence_without_loss_tokens_is_left_out_where_its_own_cannot_be_read(step):
    pack = Pack.of(step, list(range(len(step.prompt_ids))))
    gone = 4
    pack.mask[0, sum(pack.seq_lens[:gone]):sum(pack.seq_lens[:gone + 1])] = False
    own = monitor(estimator="dr_grpo")
    n = packed.update(own, **pack.tokens, **pack.truth, position_ids=pack.position_ids)
    assert n == len(step.prompt_ids) - 1
    others = step.rows([i for i in range(len(step.prompt_ids)) if i != gone])
    assert without_time(own.compute()) == pytest.approx(padded(others), **FLOAT32)


def test_with_entries_per_sequence_it_is_a_response_of_length_0(step):
    pack = Pack.of(step, list(range(len(step.prompt_ids))))
    pack.mask[0, :pack.seq_lens[0]] = False
    own = monitor(estimator="dr_grpo")
    n = packed.update(own, **pack.tokens, seq_lens=pack.seq_lens, prompt_ids=step.prompt_ids,
                      rewards=step.correct.float(), advantages=step.advantages.tolist())
    assert n == len(step.prompt_ids)
    step.mask[0] = False
    assert without_time(own.compute()) == pytest.approx(padded(step), **FLOAT32)


def test_a_micro_batch_without_loss_tokens_adds_nothing(step):
    own = monitor(estimator="dr_grpo")
    pack = Pack.of(step, [0, 1, 2])
    pack.mask.zero_()
    assert packed.update(own, **pack.tokens, **pack.truth, seq_lens=pack.seq_lens) == 0
    assert without_time(own.compute()) == {}


def test_rewards_of_nan_are_unscored_responses(step):
    own = monitor()
    rewards = step.correct.double()
    rewards[:2] = torch.nan
    pack = Pack.of(step, list(range(len(rewards))))
    per_token = torch.cat([torch.where(part, reward, -7.0) for part, reward in
                           zip(pack.split("mask"), rewards, strict=True)] + [torch.zeros(PADDING)])[None]
    packed.update(own, **pack.tokens, rewards=per_token, prompt_ids=pack.prompt_ids, seq_lens=pack.seq_lens)
    found = own.compute()
    assert found["rlvr/group/frac_unscored"] == pytest.approx(2 / len(rewards))


def test_groups_of_one_are_of_one_class(step):
    own = monitor(estimator="dr_grpo")
    packed.update(own, mask=torch.ones(1, 4), seq_lens=[2, 2], rewards=[1.0, 0.0], advantages=[0.0, 0.0],
                  prompt_ids=["a", "b"])
    found = own.compute()
    assert found["rlvr/group/frac_mixed"] == 0
    assert found["rlvr/group/frac_solved"] == found["rlvr/group/frac_failed"] == 0.5


def test_nothing_is_read_in_a_window_that_is_not_measured(step):
    own = monitor(every=2)
    own.compute()
    own.reset()
    assert packed.update(own, mask=None) == 0


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(message: str, error: type[Exception] = ValueError, **data) -> None:
    own = monitor(estimator="dr_grpo", group_size=GROUP_SIZE)
    with pytest.raises(error, match=message):
        packed.update(own, **data)
    assert "responses=0" in repr(own)


MASK = torch.ones(1, 6)
LIST = [torch.ones(2), torch.ones(4)]
CENTRED = [0.5, -0.5]


def test_bad_layouts_are_refused_by_name():
    refused("give one of seq_lens, cu_seqlens, position_ids, document_ids where mask is a tensor", mask=MASK)
    refused("got seq_lens and cu_seqlens", mask=MASK, seq_lens=[6], cu_seqlens=[0, 6])
    refused("none where it is a list", mask=LIST, seq_lens=[2, 4], advantages=CENTRED)
    refused("mask must be a list of one 1-D tensor per sequence", TypeError, mask=None)
    refused("mask must be a list of one 1-D tensor per sequence", TypeError, mask=[MASK])
    refused("seq_lens must cut the 6 tokens", mask=MASK, seq_lens=[4, 4], advantages=CENTRED)
    refused("cu_seqlens must cut the 6 tokens", mask=MASK, cu_seqlens=torch.tensor([0, 4, 2, 6]), advantages=CENTRED)
    refused("cu_seqlens must cut the 6 tokens", mask=MASK, cu_seqlens=[2, 6], advantages=CENTRED)
    refused("mask must be 0 behind the sequences, which have 4 tokens", mask=MASK, seq_lens=[2, 2], advantages=CENTRED)
    refused(r"logp must have shape \[1, 6\]", mask=MASK, seq_lens=[2, 4], advantages=CENTRED, logp=torch.zeros(6))
    refused("logp must have the lengths of mask", mask=LIST, advantages=CENTRED, logp=LIST[::-1])
    refused("prompt_ids must be laid out like mask or have one entry for each of the 2 sequences", mask=MASK,
            seq_lens=[2, 4], advantages=CENTRED, prompt_ids=["a"])
    refused("update needs rollouts, rewards, correct or advantages", mask=MASK, seq_lens=[2, 4])


def test_a_response_that_another_micro_batch_began_is_refused():
    refused("position_ids must begin at 0 in every row: this one goes on with a sequence of another micro-batch",
            mask=MASK, position_ids=torch.tensor([[4, 5, 0, 1, 2, 3]]), advantages=torch.full((1, 6), 0.5))


def test_a_response_in_two_micro_batches_is_one_too_many_for_its_prompt():
    own = monitor(group_size=2)
    packed.update(own, mask=torch.ones(1, 6), seq_lens=[2, 4], rewards=[1.0, 0.0], prompt_ids=["a", "a"])
    packed.update(own, mask=torch.ones(1, 3), seq_lens=[3], rewards=[0.0], prompt_ids=["a"])
    with pytest.raises(ValueError, match="one prompt has 3 responses in this window, more than group_size = 2"):
        own.compute()


def test_values_that_differ_within_a_response_are_refused():
    advantages = torch.tensor([[0.5, 0.5, -0.5, -0.5, -0.25, -0.5]])
    refused("advantages must be the same on all loss tokens", mask=MASK, seq_lens=[2, 4], advantages=advantages)
    elsewhere = MASK.clone()
    elsewhere[0, 4] = 0
    own = monitor(estimator="dr_grpo", group_size=2)
    assert packed.update(own, mask=elsewhere, seq_lens=[2, 4], advantages=advantages) == 2


def test_advantages_of_nan_are_refused():
    refused("advantages must be finite", mask=MASK, seq_lens=[2, 4], advantages=torch.full((1, 6), torch.nan))


def test_hidden_states_of_a_pack_go_through_rollouts(step):
    """What the guide tells users with ids and rewards: no adapter is between."""
    rows = list(range(len(step.prompt_ids)))
    pack = Pack.of(step, rows, padding=0)
    lens = torch.tensor([0, *accumulate(pack.seq_lens)])
    tokens, hidden = torch.full((int(lens[-1]),), -100), torch.zeros(int(lens[-1]), step.hidden.shape[-1])
    tokens[pack.mask[0]] = step.ids[step.mask]
    hidden[pack.mask[0]] = step.hidden[step.mask]
    rollouts = rf.Rollouts.from_packed(tokens, lens, step.correct.float(), step.prompt_ids)
    own, plain = monitor(), monitor()
    own.update(rollouts, hidden=hidden, weight=step.weight, advantages=step.advantages)
    plain.update(step.rollouts, hidden=step.hidden, weight=step.weight, advantages=step.advantages)
    assert without_time(own.compute()) == pytest.approx(without_time(plain.compute()), rel=1e-5)
