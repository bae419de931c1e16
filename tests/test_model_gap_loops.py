"""``ModelGap`` inside the training loops people write, and against a policy whose gradients are known by heart."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from test_model_gap import advantages_of, assert_exact, policy_loss, step
from torch import nn

import rlvr_fast as rf

METHODS = ("segmented", "ghost", "sketch", "exact")


class Bandit(nn.Module):
    """π(y | x) = softmax(W x)_y for a frozen table of contexts x: ∇_W log π(y) = (e_y − p) xᵀ."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.context = nn.Embedding.from_pretrained(torch.randn(9, 5, generator=generator), freeze=True)
        self.lm_head = nn.Linear(5, 9, bias=False)

    def forward(self, ids):
        return self.lm_head(self.context(ids))


@pytest.mark.parametrize("method", METHODS)
def test_softmax_bandit_in_closed_form(method, generator):
    model, ids = Bandit(generator), torch.randint(9, (12, 2), generator=generator)
    ids[:, 0] = torch.arange(12) // 6
    mask = torch.tensor([[False, True]]).expand(12, -1)
    rollouts = rf.Rollouts.from_padded(ids, mask, torch.arange(12) % 3 == 0, group_size=6)
    with rf.ModelGap(model, rollouts, method, sketch_size=64) as probe:
        logp = zoo.token_logp(model(ids), ids)
        if method == "exact":
            probe.backward(logp, mask)
        (torch.randn(12, 1, generator=generator) * logp * mask).sum().backward()
    gap = probe.gap()
    for p in range(2):
        x = model.context.weight[p].double()
        policy = torch.softmax(model.lm_head.weight.detach().double() @ x, 0)
        scores = torch.eye(9, dtype=torch.float64)[ids[6 * p:6 * p + 6, 1]] - policy
        assert torch.allclose(gap.gram[p], scores @ scores.T * x.square().sum(), rtol=1e-4, atol=1e-5)
        difference = scores[0::3].mean(0) - scores[[1, 2, 4, 5]].mean(0)
        assert gap.norm_sq_naive[p].item() == pytest.approx((difference.square().sum() * x.square().sum()).item(),
                                                            rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_may_run_inside(method, generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    before = zoo.oracle(model, batch, True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        step(model, batch, advantages_of(batch, generator), probe=probe if method == "exact" else None)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    gap = probe.gap()
    assert gap.coverage.missing == {}
    assert torch.tensor(gap.coverage.share).isnan()
    exact = torch.cat([before[name] for name in gap.coverage.tracked], 1)
    for p, members in enumerate(batch.rollouts.members):
        rows = exact[list(members)]
        assert (gap.gram[p] - rows @ rows.T).abs().max() <= 1e-5 * (rows @ rows.T).max()


@pytest.mark.parametrize("method", METHODS)
def test_responses_without_tokens_have_no_gradient(method, generator):
    batch, model = zoo.sample(generator), zoo.build()
    mask = batch.mask.clone()
    mask[2] = False
    rollouts = rf.Rollouts.from_padded(batch.ids, mask, batch.rollouts.rewards, group_size=4)
    with rf.ModelGap(model, rollouts, method) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids)
        if method == "exact":
            probe.backward(logp, mask)
        policy_loss(logp, mask, advantages_of(batch, generator)).backward()
    gram = probe.gap().gram[0]
    assert gram[2].tolist() == gram[:, 2].tolist() == [0.0] * 4
    assert (gram.diagonal()[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("method", ["segmented", "sketch"])
def test_forwards_of_different_widths(method, generator):
    """What was decided for the first forward must not stick: 3 positions, then 60."""
    batch, model = zoo.sample(generator, n_prompts=2, longest=60), zoo.build(tied=True, norm="layer")
    short = torch.tensor([min(n, 6) for n in batch.lengths[:4]])
    batch.mask[:4] &= torch.arange(batch.ids.shape[1])[None] < short[:, None]
    batch.lengths[:4] = short.tolist()
    batch.rollouts = rf.Rollouts.from_padded(batch.ids, batch.mask, batch.rollouts.rewards, group_size=4)
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        for rows in (range(4), range(4, 8)):
            part = batch.rows(rows)
            part.ids, part.mask = (x[:, :max(part.lengths)] for x in (part.ids, part.mask))
            step(model, part, torch.ones(4))
    assert_exact(probe.gap(), model, batch)


def test_a_forward_that_failed_can_be_tried_again(generator):
    batch, model = zoo.sample(generator), zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        with pytest.raises(RuntimeError, match="size"):
            model(batch.ids, position_ids=torch.zeros(8, 3))
        step(model, batch, torch.ones(8))
    assert_exact(probe.gap(), model, batch)


def test_coefficients_of_tiny_and_huge_losses(generator):
    """A gradient scaler's 2¹⁶, and a mean over many tokens."""
    batch, model = zoo.sample(generator), zoo.build()
    grams = []
    for scale in (1.0, 2.0**16, 1e-6):
        with rf.ModelGap(model, batch.rollouts) as probe:
            step(model, batch, scale * torch.ones(8))
        grams.append(torch.stack(probe.gap().gram))
        assert probe.coverage.missing == {}
        model.zero_grad()
    for other in grams[1:]:
        assert torch.allclose(grams[0], other, rtol=1e-4, atol=1e-5 * grams[0].max().item())


def test_two_modules_with_one_weight(generator):
    batch, model = zoo.sample(generator), zoo.build(bias=False)
    model.blocks[1].mlp[0].weight = model.blocks[0].mlp[0].weight
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert probe.coverage.missing == {}
    assert_exact(probe.gap(), model, batch)


def test_a_weight_that_is_shared_with_something_untracked_is_left_out(generator):
    """Half of such a gradient would look plausible and be wrong."""
    batch, model = zoo.sample(generator), zoo.build()

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    replacement = Own(zoo.WIDTH, zoo.WIDTH, bias=False)
    replacement.weight = model.blocks[0].o.weight
    model.blocks[1].o = replacement
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert list(probe.coverage.missing) == ["blocks.0.o.weight"]
    assert "forward of its own" in probe.coverage.missing["blocks.0.o.weight"]
    assert_exact(probe.gap(), model, batch)


def test_an_embedding_that_is_also_used_by_hand_is_noticed(generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True, functional_head=True)
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=64) as probe:
        step(model, batch, advantages_of(batch, generator), probe=probe)
    assert "outside its module" in probe.coverage.missing["embed.weight"]
    assert_exact(probe.gap(), model, batch)


def test_padding_rows_of_an_embedding_have_no_gradient(generator):
    batch, model = zoo.sample(generator), zoo.build()
    model.embed.padding_idx = int(batch.ids[0, 0])
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert probe.coverage.missing == {}
    assert_exact(probe.gap(), model, batch)
