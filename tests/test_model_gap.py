"""``ModelGap`` against one float64 backward per response, over everything that per-response gradients trip over.

Tolerance 1e-5 relative to the largest ‖G_i‖² of the prompt for a float32 model: rounding of its activations and of
back-propagated gradients; 1e-11 for a float64 one, where only the order of summation is left.
"""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch

import rlvr_fast as rf
import rlvr_fast.reference as ref
from rlvr_fast.model_gap import collect, ghost, segmented

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
FEATURES = {
    "plain": {}, "tied": {"tied": True}, "layer norm": {"norm": "layer"}, "unit offset norm": {"gemma_norm": True},
    "no bias, one kv head": {"bias": False, "kv_heads": 1}, "shared layers": {"shared_mlp": True},
    "lora": {"lora": True}, "in place": {"inplace": True},
    **{f"{kind} checkpointing": {"checkpointing": kind, "tied": True, "shared_mlp": True}
       for kind in ("reentrant", "non-reentrant", "nested")},
    "reentrant checkpointing, lora": {"checkpointing": "reentrant", "lora": True},
}


def policy_loss(logp, mask, advantages):
    """−Σ A_i log π(o_i) / 7: one coefficient per response."""
    return -(advantages[:, None] * logp * mask).sum() / 7


def advantages_of(batch, generator):
    return torch.randn(len(batch.ids), generator=generator)


def step(model, batch, advantages, *, probe=None):
    """One training step on one forward."""
    logp = zoo.token_logp(model(batch.ids), batch.ids)
    if probe is not None:
        probe.backward(logp, batch.mask)
    policy_loss(logp, batch.mask, advantages).backward()


def plain_gradients(model, run) -> dict[str, torch.Tensor]:
    """The gradients of ``run()`` without a probe; leaves the model without gradients."""
    model.zero_grad()
    run()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_exact(gap, model, batch, *, dtype=torch.float32, length_norm=True, tolerance=None, **options):
    """Gram matrices and every estimate against the oracle on the covered parameters."""
    gradients = zoo.oracle(model, batch, length_norm, **options)
    exact = torch.cat([gradients[name] for name in gap.coverage.tracked], 1)
    for p, members in enumerate(batch.rollouts.members):
        rows = exact[list(members)]
        expected = rows @ rows.T
        allowed = (tolerance or TOLERANCE[dtype]) * expected.diagonal().max()
        assert (gap.gram[p] - expected).abs().max() <= allowed
        plus, minus = (rows[batch.rollouts.correct[list(members)] == which] for which in (True, False))
        if min(len(plus), len(minus)) > 1:
            assert (gap.norm_sq_naive[p] - ref.gap_norm_sq_naive(plus, minus)).abs() <= 4 * allowed
            assert (gap.norm_sq[p] - ref.gap_norm_sq(plus, minus)).abs() <= 4 * allowed
            assert (gap.stderr[p] - ref.gap_stderr(plus, minus)).abs() <= 20 * allowed


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["training", "probe"])
@pytest.mark.parametrize("method", ["segmented", "ghost"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_architecture_agrees_with_a_loop_over_responses(features, method, source, generator):
    batch, model = zoo.sample(generator), zoo.build(**features).train()
    advantages = advantages_of(batch, generator)
    expected = plain_gradients(model, lambda: step(model, batch, advantages))
    with rf.ModelGap(model, batch.rollouts, method) as probe:
        step(model, batch, advantages, probe=probe if source == "probe" else None)
    gap = probe.gap()
    assert gap.source == probe.source == source
    assert gap.coverage.missing == {}
    assert gap.coverage.share == pytest.approx(1.0, abs=1e-12)
    assert_exact(gap, model, batch)
    for name, gradient in expected.items():
        own = dict(model.named_parameters())[name].grad
        if method == "ghost" or source == "probe":
            assert torch.equal(own, gradient)
        else:  # the order of summation
            assert (own - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("features", [FEATURES["tied"], FEATURES["reentrant checkpointing"], FEATURES["lora"]])
def test_exact_method(features, generator):
    batch, model = zoo.sample(generator), zoo.build(**features).train()
    advantages = advantages_of(batch, generator)
    expected = plain_gradients(model, lambda: step(model, batch, advantages))
    with rf.ModelGap(model, batch.rollouts, "exact") as probe:
        step(model, batch, advantages, probe=probe)
    assert probe.coverage.share == pytest.approx(1.0)
    assert_exact(probe.gap(), model, batch)
    assert all(torch.equal(dict(model.named_parameters())[name].grad, value) for name, value in expected.items())


@pytest.mark.parametrize("method", ["segmented", "ghost"])
@pytest.mark.parametrize("length_norm", [True, False])
def test_float64_leaves_only_the_order_of_summation(method, length_norm, generator):
    batch, model = zoo.sample(generator, group_size=6), zoo.build(dtype=torch.float64, tied=True, shared_mlp=True)
    with rf.ModelGap(model, batch.rollouts, method, length_norm=length_norm) as probe:
        step(model, batch, advantages_of(batch, generator).double())
    assert_exact(probe.gap(), model, batch, dtype=torch.float64, length_norm=length_norm)


def test_tied_weights_need_both_cross_terms(generator):
    """Leaving the products of the embedding's and the head's parts out is wrong by far more than rounding."""
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    twin = zoo.build(tied=True)
    twin.lm_head.weight = torch.nn.Parameter(twin.embed.weight.detach().clone())
    parts = zoo.oracle(twin, batch, True)
    separate = sum(rows @ rows.T for rows in (parts["embed.weight"], parts["lm_head.weight"]))
    whole = (parts["embed.weight"] + parts["lm_head.weight"])
    members = list(batch.rollouts.members[0])
    ours = probe._recording.collector.grams["embed.weight"][members, :len(members)]
    scale = 1 / (probe.gap().coefficients * batch.rollouts.lengths)[members]
    ours = ours * scale[:, None] * scale
    together = (whole @ whole.T)[members][:, members]
    assert torch.allclose(ours, together, atol=1e-5 * together.max().item())
    assert (together - separate[members][:, members]).abs().max() > 0.01 * together.max()


def test_prompts_may_be_interleaved(generator):
    batch = zoo.sample(generator, order=[0, 1, 1, 0, 1, 0, 0, 1])
    model = zoo.build(tied=True)
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert batch.rollouts.members[0] == (0, 3, 5, 6)
    assert_exact(probe.gap(), model, batch)


def test_groups_of_one_response_and_classes_of_one(generator):
    batch, model = zoo.sample(generator, group_size=2), zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    gap = probe.gap()
    assert gap.defined.all()
    assert gap.pooled.all()
    assert gap.norm_sq.isnan().all()
    assert gap.norm_sq_naive.isfinite().all()
    assert_exact(gap, model, batch)


@pytest.mark.parametrize("method", ["segmented", "ghost", "sketch"])
def test_packed_rows(method, generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    ids, positions, mask = batch.packed()
    advantages = advantages_of(batch, generator)
    weights = torch.repeat_interleave(advantages, torch.tensor(batch.lengths))[None]
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        logp = zoo.token_logp(model(ids, position_ids=positions), ids)
        (-(weights * logp * mask).sum()).backward()
    assert probe.gap().coefficients.tolist() == pytest.approx((-advantages).tolist(), rel=1e-4)
    assert_exact(probe.gap(), model, batch)  # k = 64 is as wide as this model: the sketch is exact


@pytest.mark.parametrize("method", ["segmented", "sketch", "exact"])
def test_gradient_accumulation_by_prompts(method, generator):
    batch, model = zoo.sample(generator, n_prompts=3), zoo.build(tied=True)
    advantages = advantages_of(batch, generator)
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        for p in range(3):
            rows = range(4 * p, 4 * p + 4)
            step(model, batch.rows(rows), advantages[list(rows)], probe=probe if method == "exact" else None)
    assert_exact(probe.gap(), model, batch)
    assert probe.coverage.share == pytest.approx(1.0)


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant"])
def test_several_forwards_before_one_backward(checkpointing, generator):
    batch, model = zoo.sample(generator), zoo.build(shared_mlp=True, checkpointing=checkpointing).train()
    advantages = advantages_of(batch, generator)
    with rf.ModelGap(model, batch.rollouts) as probe:
        losses = []
        for p in range(2):
            part = batch.rows(range(4 * p, 4 * p + 4))
            losses.append(policy_loss(zoo.token_logp(model(part.ids), part.ids), part.mask,
                                      advantages[4 * p:4 * p + 4]))
        sum(losses).backward()
    assert_exact(probe.gap(), model, batch)


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_a_prompt_may_be_split_over_forwards(method, generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    advantages = advantages_of(batch, generator)
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        for rows in ([0, 1, 2], [3, 4], [5, 6, 7]):
            step(model, batch.rows(rows), advantages[rows], probe=probe if method == "exact" else None)
    assert_exact(probe.gap(), model, batch)


def test_parts_of_the_model_inside_a_declared_micro_batch(generator):
    """A loop that calls backbone and head itself, on response tokens only, with responses in another order."""
    batch, model = zoo.sample(generator), zoo.build()
    advantages = advantages_of(batch, generator)
    order = [4, 5, 6, 7, 0, 1, 2, 3]
    part = batch.rows(order)
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    backbone, whole = model, torch.nn.ModuleDict({"backbone": model, "lm_head": head})
    with rf.ModelGap(whole, batch.rollouts) as probe:
        with probe.micro_batch(order, input_ids=part.ids):
            hidden = backbone(part.ids)[:, :-1][part.mask[:, 1:]]
            logits = head(hidden)
        logp = torch.log_softmax(logits, -1).gather(1, part.ids[part.mask][:, None]).squeeze(1)
        weights = torch.repeat_interleave(advantages[order], batch.rollouts.lengths[order])
        (weights * logp).sum().backward()
    model.lm_head = head
    gap = probe.gap()
    assert gap.coefficients.tolist() == pytest.approx(advantages.tolist(), rel=1e-4)
    names = {f"backbone.{name}": name for name, _ in model.named_parameters()} | {"lm_head.weight": "lm_head.weight"}
    gradients = zoo.oracle(model, batch, True)
    exact = torch.cat([gradients[names[name]] for name in gap.coverage.tracked], 1)
    for p, members in enumerate(batch.rollouts.members):
        rows = exact[list(members)]
        assert torch.allclose(gap.gram[p], rows @ rows.T, atol=1e-5 * (rows @ rows.T).max().item())


def test_under_bfloat16_autocast(generator):
    """Against the same bfloat16 forward, backward by backward: 3 %, the rounding of one factor in the other's place."""
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    advantages = advantages_of(batch, generator)

    def autocast_step(probe=None):
        with torch.autocast("cpu", torch.bfloat16):
            logp = zoo.token_logp(model(batch.ids), batch.ids)
        if probe is not None:
            probe.backward(logp, batch.mask)
        policy_loss(logp, batch.mask, advantages).backward()

    expected = plain_gradients(model, autocast_step)
    grams = {}
    for method in ("segmented", "ghost", "exact"):
        model.zero_grad()
        with rf.ModelGap(model, batch.rollouts, method) as probe:
            autocast_step(probe if method == "exact" else None)
        gap = grams[method] = probe.gap()
        assert gap.coverage.missing == {}
        for name, gradient in expected.items():
            own = dict(model.named_parameters())[name].grad
            assert own.dtype == torch.float32
            if method == "segmented":  # forms in float32 what autocast rounds to bfloat16
                assert (own - gradient).abs().max() <= 0.01 * gradient.abs().max()
            else:
                assert torch.equal(own, gradient)
    for method in ("segmented", "ghost"):
        for own, exact in zip(grams[method].gram, grams["exact"].gram, strict=True):
            assert (own - exact).abs().max() <= 0.03 * exact.max()


def test_a_bfloat16_model(generator):
    batch, model = zoo.sample(generator), zoo.build().to(torch.bfloat16)
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator), probe=probe)
    assert probe.coverage.missing == {}
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert_exact(probe.gap(), model, batch, tolerance=0.1)


def test_gradients_that_were_there_stay_and_are_added_to(generator):
    batch, model = zoo.sample(generator), zoo.build()
    advantages = advantages_of(batch, generator)
    step(model, batch, advantages)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages)
    assert probe.coverage.missing == {}
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, 2 * once[name], rtol=1e-4, atol=1e-6)


# -- choice of the algorithm per layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_blocks_and_tiles_of_any_size(block_bytes, generator, monkeypatch):
    monkeypatch.setattr(segmented, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(ghost, "TILE_BYTES", block_bytes)
    lengths = [3, 0, 5]
    pieces = [[(torch.randn(n, 7, generator=generator).double(), torch.randn(n, 4, generator=generator).double())
               for n in (length, 2)] for length in lengths]
    rows = torch.stack([sum(b.T @ a for b, a in own).reshape(-1) for own in pieces])
    direction, total = torch.randn(7, 4, generator=generator).double(), torch.zeros(7, 4, dtype=torch.float64)
    for grams, dots in (segmented.segmented_gram([pieces], (7, 4), direction, total),
                        ghost.ghost_gram([pieces], direction)):
        assert torch.allclose(grams[0], rows @ rows.T, rtol=1e-12)
        assert torch.allclose(dots[0], rows @ direction.reshape(-1), rtol=1e-12)
    assert torch.allclose(total.reshape(-1), rows.sum(0), rtol=1e-12)


def test_segmented_takes_the_tokens_gram_for_short_groups(generator, monkeypatch):
    assert collect.ghost_is_cheaper(16, 4, 4096, 4096)
    assert not collect.ghost_is_cheaper(8 * 512, 8, 4096, 4096)
    calls = []
    monkeypatch.setattr(collect, "ghost_gram", lambda *a: calls.append(1) or ghost.ghost_gram(*a))
    batch, model = zoo.sample(generator), zoo.build()
    for cheaper in (True, False):
        monkeypatch.setattr(collect, "ghost_is_cheaper", lambda *_, cheaper=cheaper: cheaper)
        calls.clear()
        with rf.ModelGap(model, batch.rollouts) as probe:
            step(model, batch, torch.ones(8))
        assert bool(calls) == cheaper
        assert_exact(probe.gap(), model, batch)
        model.zero_grad()


# -- direction and report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["segmented", "ghost", "exact", "sketch"])
def test_alignment_with_a_direction(method, generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    given = {parameters[name]: value for name, value in direction.items()}
    with rf.ModelGap(model, batch.rollouts, method, direction=given, sketch_size=64) as probe:
        step(model, batch, advantages_of(batch, generator), probe=probe)
    gap, gradients = probe.gap(), zoo.oracle(model, batch, True)
    along = sum(gradients[name] @ direction[name].double().reshape(-1) for name in gradients)
    scale = sum(g.norm(dim=1) * direction[name].double().norm() for name, g in gradients.items()).max()
    for p, members in enumerate(batch.rollouts.members):
        own, correct = along[list(members)], batch.rollouts.correct[list(members)]
        assert (gap.alignment[p] - (own[correct].mean() - own[~correct].mean())).abs() <= 1e-5 * scale


@pytest.mark.parametrize("method", ["segmented", "sketch"])
def test_report(method, generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    with rf.ModelGap(model, batch.rollouts, method) as probe:
        step(model, batch, advantages_of(batch, generator))
    gap = probe.gap()
    summary = gap.summary()
    assert summary["rlvr/gap/norm_sq"] == pytest.approx(gap.norm_sq.mean().item())
    assert summary["rlvr/gap/coverage"] == pytest.approx(1.0)
    assert summary["rlvr/group/frac_mixed"] == 1.0
    assert gap.success_rate.tolist() == [0.5, 0.5]
    assert torch.allclose(sum(gap.parameter_norm_sq.values()), gap.norm_sq)
    assert "segmented" in repr(gap) or "sketch" in repr(gap)
    assert "share=1.0" in repr(gap.coverage)
    assert "closed" in repr(probe)


@pytest.mark.gpu
def test_half_precision_products_on_a_gpu(generator):
    """bfloat16 factors with float32 results, against the same factors in float64."""
    pieces = [[tuple(torch.randn(n, d, generator=generator).bfloat16() for d in (70, 40))] for n in (30, 0, 17)]
    rows = torch.stack([(b.double().T @ a.double()).reshape(-1) for ((b, a),) in pieces])
    moved = [[(b.cuda(), a.cuda())] for ((b, a),) in pieces]
    total = torch.zeros(70, 40, device="cuda")
    for grams, _ in (segmented.segmented_gram([moved], (70, 40), None, total), ghost.ghost_gram([moved])):
        assert torch.allclose(grams[0].cpu(), rows @ rows.T, rtol=1e-4, atol=1e-2)
    assert torch.allclose(total.cpu().double().reshape(-1), rows.sum(0), atol=1e-4)
