"""Reading each response's coefficient off the logits' gradient, and noticing every loss where that cannot be done."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from test_model_gap import advantages_of, assert_exact, policy_loss, step
from torch.nn import functional as F

import rlvr_fast as rf
from rlvr_fast.model_gap.coefficients import token_coefficients


def measured(model, batch, loss, *, probe_first=False, **options):
    with rf.ModelGap(model, batch.rollouts, **options) as probe:
        logits = model(batch.ids)
        logp = zoo.token_logp(logits, batch.ids, options.get("temperature", 1.0))
        if probe_first:
            probe.backward(logp, batch.mask)
        loss(logits, logp, batch).backward()
    return probe.gap()


@pytest.mark.parametrize(("estimator", "aggregation", "options"), [
    ("grpo", "grpo", {}), ("grpo", "dapo", {}), ("rloo", "seq_mean_token_sum", {}),
    ("dr_grpo", "dr_grpo", {"max_length": 9})])
def test_coefficients_of_the_losses_in_use(estimator, aggregation, options, generator):
    batch, model = zoo.sample(generator, correct=[1, 0, 0, 0, 1, 1, 0, 1]), zoo.build()
    weights = rf.loss_weights(batch.rollouts, rf.advantages(batch.rollouts, estimator), aggregation, **options)

    def loss(logits, logp, batch):
        ratio = (batch.rollouts.pack(logp) - batch.rollouts.pack(logp).detach()).exp()
        clipped = torch.minimum(ratio * weights, ratio.clamp(0.8, 1.2) * weights)
        return -clipped.sum()

    gap = measured(model, batch, loss)
    first = batch.rollouts.cu_seqlens[:-1]
    assert gap.coefficients.tolist() == pytest.approx((-weights[first]).tolist(), rel=1e-4)
    assert_exact(gap, model, batch)


def test_temperature(generator):
    batch, model = zoo.sample(generator), zoo.build()
    advantages = advantages_of(batch, generator)
    gap = measured(model, batch, lambda _, logp, b: policy_loss(logp, b.mask, advantages), temperature=0.7)
    assert_exact(gap, model, batch, temperature=0.7)
    model.zero_grad()
    with rf.ModelGap(model, batch.rollouts) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids, 0.7)
        policy_loss(logp, batch.mask, advantages).backward()
    with pytest.raises(RuntimeError, match="temperature"):
        probe.gap()


def entropy_of(logits):
    p = logits.softmax(-1)
    return -(p * logits.log_softmax(-1)).sum(-1)


OTHER_LOSSES = {
    "ratios off policy": (lambda z, logp, b: -(b.mask * (logp - 1.1 * logp.detach()).exp()).sum(), "different"),
    "clipped token": (lambda z, logp, b: -(b.mask * (logp * (torch.arange(logp.shape[1]) != 4))).sum(), "clipped"),
    "kl (k3)": (lambda z, logp, b: (b.mask * (0.1 * ((-0.3 - logp).exp() + logp) - logp)).sum(), "different"),
    "entropy bonus": (lambda z, logp, b: -(b.mask * (logp + 0.1 * F.pad(entropy_of(z)[:, :-1], (1, 0)))).sum(),
                      "not a multiple"),
    "z-loss": (lambda z, logp, b: -(b.mask * (logp - 0.01 * F.pad(z.logsumexp(-1)[:, :-1].square(), (1, 0)))).sum(),
               "not a multiple"),
    "label smoothing": (lambda z, logp, b: -(b.mask * (0.9 * logp + 0.1 * F.pad(
        z.log_softmax(-1).mean(-1)[:, :-1], (1, 0)))).sum(), "not a multiple"),
    "soft cap": (lambda z, logp, b: -(b.mask * zoo.token_logp(3 * (z / 3).tanh(), b.ids)).sum(), "not a multiple"),
    "loss on the prompt": (lambda z, logp, b: -logp[:, 1:].sum(), "positions carry"),
}


@pytest.mark.parametrize(("loss", "reason"), OTHER_LOSSES.values(), ids=OTHER_LOSSES)
def test_other_losses_are_noticed_and_a_probe_serves_them(loss, reason, generator):
    batch, model = zoo.sample(generator), zoo.build()
    with pytest.raises(RuntimeError, match=reason) as error:
        measured(model, batch, loss)
    assert "probe.backward" in str(error.value)
    model.zero_grad()
    loss(logits := model(batch.ids), zoo.token_logp(logits, batch.ids), batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    gap = measured(model, batch, loss, probe_first=True)
    assert gap.source == "probe"
    assert gap.coefficients.tolist() == [1.0] * 8
    assert_exact(gap, model, batch)
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_sources_may_be_mixed(generator):
    batch, model = zoo.sample(generator), zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch.rows(range(4)), torch.full((4,), -0.3))
        step(model, batch.rows(range(4, 8)), torch.zeros(4), probe=probe)
    gap = probe.gap()
    assert gap.source == "mixed"
    assert gap.coverage.missing == {}
    assert_exact(gap, model, batch)


def test_solved_prompts_have_no_coefficient_and_no_gap(generator):
    batch = zoo.sample(generator, n_prompts=3, correct=[1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1])
    model = zoo.build()
    advantages = rf.advantages(batch.rollouts, "grpo")
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages)
    gap = probe.gap()
    assert gap.measured_prompts.tolist() == [True, False, True]
    assert gap.defined.tolist() == [True, False, True]
    assert gap.n_correct.tolist() == [2, 4, 2]
    assert gap.n_incorrect.tolist() == [2, 0, 2]
    assert gap.norm_sq.isnan().tolist() == [False, True, False]
    assert gap.gram[1] is None
    assert gap.summary()["rlvr/group/frac_solved"] == pytest.approx(1 / 3)
    exact = torch.cat(list(zoo.oracle(model, batch, True).values()), 1)
    for p in (0, 2):
        rows = exact[list(batch.rollouts.members[p])]
        assert torch.allclose(gap.gram[p], rows @ rows.T, atol=1e-5 * (rows @ rows.T).max().item())


def test_a_mixed_prompt_without_coefficient_asks_for_a_probe(generator):
    batch, model = zoo.sample(generator), zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    with pytest.raises(RuntimeError, match=r"prompt 1 .* coefficient 0 .*probe\.backward"):
        probe.gap()


@pytest.mark.parametrize("keep", ["last K", "all but the last"])
def test_heads_on_a_part_of_the_positions(keep, generator):
    batch, model = zoo.sample(generator), zoo.build()
    advantages = advantages_of(batch, generator)
    width = batch.ids.shape[1]
    first = int(batch.mask.long().argmax(1).min()) - 1
    head = model.lm_head.forward

    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.lm_head, model.lm_head = model, model.lm_head, torch.nn.Identity()

        def forward(self, ids):
            hidden = self.model(ids)
            return self.lm_head(hidden[:, first:] if keep == "last K" else hidden[:, :-1])

    whole = Part()
    with rf.ModelGap(whole, batch.rollouts) as probe:
        logits = whole(batch.ids)
        padded = F.pad(logits, (0, 0, first, 0)) if keep == "last K" else F.pad(logits, (0, 0, 0, 1))
        assert padded.shape[1] == width
        policy_loss(zoo.token_logp(padded, batch.ids), batch.mask, advantages).backward()
    assert probe.gap().coefficients.tolist() == pytest.approx((-advantages / 7).tolist(), rel=1e-4)
    assert whole.lm_head.forward == head


def test_a_fused_loss_without_logits_asks_for_a_probe(generator):
    batch, model = zoo.sample(generator), zoo.build(functional_head=True)
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, torch.ones(8))
    with pytest.raises(RuntimeError, match="no gradient came through the lm_head"):
        probe.gap()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, torch.ones(8), probe=probe)
    assert list(probe.coverage.missing) == ["lm_head.weight"]
    assert 0.3 < probe.coverage.share < 1.0
    assert_exact(probe.gap(), model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_token_coefficients_over_peaked_and_flat_policies(scale, dtype, generator):
    """Logits up to ±60: the target's own probability runs from 1e-40 to 1 − 1e-40."""
    n, v, d = 64, 101, 8
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (scale * torch.randn(v, d, generator=generator) / d**0.5).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype)
    logits = (hidden @ weight.T + bias).requires_grad_()
    targets = torch.where(torch.arange(n) % 2 == 0, logits.argmax(1), torch.randint(v, (n,), generator=generator))
    c = torch.randn(n, generator=generator).to(dtype)
    (c * torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)).sum().backward()
    columns = torch.arange(10)
    found, residual = token_coefficients(hidden, logits.grad, weight, bias, targets, columns, 1.0)
    precise = 1e-4 if dtype == torch.float32 else 1e-11
    assert (found / c - 1).abs().max() < precise
    assert residual.max() < precise
