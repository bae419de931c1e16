"""The two-sided CountSketch: unbiased, with the variance of its formula, linear in tokens, and without a trace."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from test_model_gap import FEATURES, advantages_of, plain_gradients, step

import rlvr_fast as rf
from rlvr_fast.model_gap import native
from rlvr_fast.model_gap.sketch import Fold, _salt, hashed, span_products


def folded(gradient: torch.Tensor, k_out: int, k_in: int, seed: int) -> torch.Tensor:
    d_out, d_in = gradient.shape
    out = Fold(d_out, k_out, seed=seed, name="w", side="out", device=gradient.device)
    own = Fold(d_in, k_in, seed=seed, name="w", side="in", device=gradient.device)
    return own(out(gradient.T).T)


def exact_variance(g: torch.Tensor, k_out: int, k_in: int) -> torch.Tensor:
    """Relative variance of ‖Ĝ‖², Σ over pairs of entries of P(same row) P(same column) products² [derived].

    Features of one block of k never meet, others do with probability 1/k. Signs are independent, so a product of two
    entries is correlated with the one of the opposite corners alone.
    """
    g = g.double() / g.double().norm()
    out, own = _meet(len(g), k_out), _meet(g.shape[1], k_in)
    rows, columns, squares = g @ g.T, g.T @ g, g.square()
    corners = squares @ own @ squares.T
    opposite = (rows.square() - sum((block @ block.T).square() for block in g.split(k_in, 1))) / k_in
    return 2 * ((own * columns.square()).sum() + (out * rows.square()).sum() + (out * (corners + opposite)).sum())


def _meet(d: int, k: int) -> torch.Tensor:
    """[d, d] probability that two different features come to the same column."""
    block = torch.arange(d) // k
    return (block[:, None] != block).double() / k


def formula(g: torch.Tensor, k_out: int, k_in: int) -> torch.Tensor:
    r4 = g.double().square().sum() ** 2 / (g @ g.T).double().square().sum()
    return 2 * (1 / k_out + 1 / k_in + 1 / (k_out * k_in)) / r4 + 2 / (k_out * k_in)


def test_the_formula_bounds_the_variance_and_is_reached_by_wide_layers(generator):
    for d_out, d_in, rank in ((60, 50, 40), (800, 600, 1), (800, 600, 12)):
        g = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
        ratio = exact_variance(g, 32, 32) / formula(g, 32, 32)
        assert (0.85 if d_out > 60 else 0.25) < ratio < 1.0


@pytest.mark.parametrize(("rank", "k_out", "k_in"), [(1, 16, 16), (1, 8, 32), (12, 16, 16), (40, 16, 8)])
def test_unbiased_with_the_variance_of_the_formula(rank, k_out, k_in, generator):
    """2000 seeds: the mean within 4 standard errors; the variance within 20 % (its own standard error is ~5 %)."""
    d_out, d_in, n_seeds = 60, 50, 2000
    gradient = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
    other = torch.randn(d_out, d_in, generator=generator)
    squares, products = [], []
    for seed in range(n_seeds):
        image = folded(gradient, k_out, k_in, seed)
        squares.append(image.square().sum() / gradient.square().sum())
        products.append((image * folded(other, k_out, k_in, seed)).sum())
    squares, products = torch.stack(squares).double(), torch.stack(products).double()
    variance = exact_variance(gradient, k_out, k_in)
    assert abs(squares.mean() - 1) <= 4 * (variance / n_seeds) ** 0.5
    assert 0.8 < squares.var() / variance < 1.2
    assert abs(products.mean() - (gradient * other).sum()) <= 4 * products.std() / n_seeds**0.5


def test_hash_is_stateless_even_and_uncorrelated(generator):
    ids, k = torch.arange(100_000), 32
    columns, signs = hashed(ids, k, 3, "layer.weight", "out")
    some = torch.randperm(len(ids), generator=generator)[:1000]
    again = hashed(ids[some], k, 3, "layer.weight", "out")
    assert torch.equal(columns[some], again[0])
    assert torch.equal(signs[some], again[1])
    assert columns.view(-1, k).sort(1).values.eq(torch.arange(k)).all()  # every block of k has all columns,
    counts = columns[::k].bincount(minlength=k).double()  # turned by an even number of places
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 62  # χ² with 31 degrees, p = 1e-3
    assert abs(signs.mean()) < 4 / len(ids) ** 0.5
    for other in (hashed(ids, k, 4, "layer.weight", "out"), hashed(ids, k, 3, "layer.weight", "in"),
                  hashed(ids, k, 3, "layer.bias", "out")):
        assert abs((signs * other[1]).mean()) < 4 / len(ids) ** 0.5
        met = (columns == other[0]).double().mean()  # blocks meet as a whole
        assert abs(met - 1 / k) < 4 * (k / len(ids) / k) ** 0.5
    assert abs((signs[1:] * signs[:-1]).mean()) < 4 / len(ids) ** 0.5
    rotation = (columns - ids) % k
    assert abs((signs * (rotation % 2 * 2 - 1)).mean()) < 4 / len(ids) ** 0.5


def test_an_outlier_channel_is_no_worse_than_the_formula(generator):
    """One input channel 30 times the others, as language models have: random masks would lose or keep it whole."""
    gradient = torch.randn(60, 50, generator=generator)
    gradient[:, 7] *= 30
    squares = torch.stack([folded(gradient, 32, 32, seed).square().sum() for seed in range(500)]).double()
    squares /= gradient.double().square().sum()
    assert squares.var() < 1.2 * formula(gradient, 32, 32)


def test_every_way_to_fold_is_the_same_map(generator):
    """Native code on each instruction set bit by bit; the product with R to the order of summation: 1e-5 of sums of
    hundreds of terms of size 1."""
    for d, k, start, size in ((384, 32, 0, 384), (1000, 33, 0, 1000), (1000, 33, 130, 400), (70, 7, 3, 11)):
        whole = Fold(d, k, seed=-3, name="w", side="in", device=torch.device("cpu"))
        part = whole.narrow(start, size)
        assert torch.equal(part.matrix, whole.matrix[start:start + size])
        wide = torch.randn(37, 2 * size, generator=generator)
        for x in (wide[:, :size], wide[:, ::2], wide[:, size:].bfloat16(), wide[:, size:].half()):
            expected = x.double() @ part.matrix.double()
            assert torch.allclose(part(x).double(), expected, atol=1e-5 * size**0.5)
            assert part(x).dtype == torch.float32
            if native.serves(x):
                images = [native.fold_rows(x, k, start, _salt(-3, "w", "in"), instruction_set=name)
                          for name in ("auto", "avx2", "baseline")]
                assert all(torch.equal(image, part(x)) for image in images)
        assert torch.equal(part(wide[:, :size].double()), wide[:, :size].double() @ part.matrix.double())


def test_span_products_of_padded_and_packed_rows(generator):
    b, a = torch.randn(12, 3, generator=generator), torch.randn(12, 5, generator=generator)
    for spans in ([(0, 4), (4, 8), (8, 12)], [(0, 1), (1, 1), (1, 12)], [(4, 8), (0, 4), (8, 12)]):
        expected = torch.stack([(b[s:e].T @ a[s:e]).flatten() for s, e in spans])
        assert torch.allclose(span_products(b, a, spans), expected, atol=1e-5)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_gradients_are_those_of_a_plain_backward_bit_by_bit(features, generator):
    batch, model = zoo.sample(generator), zoo.build(**features).train()
    advantages = advantages_of(batch, generator)
    expected = plain_gradients(model, lambda: step(model, batch, advantages))
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=4) as probe:
        step(model, batch, advantages)
    assert probe.coverage.missing == {}
    for name, p in model.named_parameters():
        assert name not in expected or torch.equal(p.grad, expected[name])


def test_gap_of_a_model_is_unbiased(generator):
    """Mean over 60 seeds of every Gram entry within 4.5 standard errors (32 entries) of the exact method."""
    batch, model = zoo.sample(generator), zoo.build(tied=True, shared_mlp=True)
    with rf.ModelGap(model, batch.rollouts, "exact") as probe:
        step(model, batch, torch.ones(8), probe=probe)
    exact = torch.stack(probe.gap().gram)
    grams = []
    for seed in range(60):
        with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=6, seed=seed) as probe:
            step(model, batch, torch.ones(8))
        grams.append(torch.stack(probe.gap().gram))
    grams = torch.stack(grams)
    assert ((grams.mean(0) - exact).abs() <= 4.5 * grams.std(0) / 60**0.5 + 1e-6 * exact.abs().max()).all()
    assert (grams.std(0) > 0.01 * exact.abs().max()).any()  # it does compress


def test_any_split_adds_up_to_the_whole(generator):
    batch, model = zoo.sample(generator), zoo.build(tied=True)
    grams = []
    for parts in ([range(8)], [[0], [1, 2, 3, 4, 5], [6, 7]], [[i] for i in range(8)]):
        with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=5) as probe:
            for rows in parts:
                step(model, batch.rows(rows), torch.ones(len(rows)))
        grams.append(torch.stack(probe.gap().gram))
    for other in grams[1:]:
        assert torch.allclose(other, grams[0], atol=1e-5 * grams[0].abs().max().item())


def test_vectors_are_there_for_batch_figures(generator):
    batch, model = zoo.sample(generator), zoo.build()
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=64) as probe:
        step(model, batch, torch.ones(8))
    gap = probe.gap().measured
    gradients = torch.cat(list(zoo.oracle(model, batch, True).values()), 1)
    correct = batch.rollouts.correct
    gaps = torch.stack([gradients[4 * p:4 * p + 4][correct[4 * p:4 * p + 4]].mean(0)
                        - gradients[4 * p:4 * p + 4][~correct[4 * p:4 * p + 4]].mean(0) for p in range(2)])
    products = gap.vector.double() @ gap.vector.double().T
    assert torch.allclose(products, gaps @ gaps.T, atol=1e-4 * products.max().item())
    assert gap.batch_norm_sq()[0].isfinite()


def test_interference_between_prompts(generator):
    batch = zoo.sample(generator, n_prompts=3, correct=[1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1])
    model = zoo.build(tied=True)
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=64) as probe:
        step(model, batch, rf.advantages(batch.rollouts, "grpo"))
    gap = probe.gap()
    gradients = torch.cat(list(zoo.oracle(model, batch, True).values()), 1)
    first, last = (gradients[list(members)] for members in (batch.rollouts.members[0], batch.rollouts.members[2]))
    product = (first[[0, 2]].mean(0) - first[[1, 3]].mean(0)) @ (last[[1, 3]].mean(0) - last[[0, 2]].mean(0))
    found = gap.interference()
    assert found[0, 2].item() == found[2, 0].item() == pytest.approx(product.item(), rel=1e-3)
    assert torch.equal(found.diagonal()[[0, 2]], gap.norm_sq[[0, 2]])
    assert found.isnan().sum() == 5
    assert gap.vector.isnan().all(1).tolist() == [False, True, False]
    model.zero_grad()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, torch.ones(12))
    with pytest.raises(ValueError, match="interference needs method 'sketch'"):
        probe.gap().interference()
