"""``gradient_gap`` end to end: every level, backend and normalisation against the float64 specification.

Tolerances: response gradients are fp32 sums with a relative 1e-5 (logits of magnitude 10, see test_token_stats), and
every squared quantity inherits it relative to the plug-in norm, which all the others are differences of. The Triton
backend rounds each derivative once to the operands' dtype: for half precision that comes on top.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import rounding_error
from policies import TabularPolicy, classes_of, partitions, random_rollouts, reference_gradients, within

import rlvr_fast as rf
import rlvr_fast.reference as ref
from rlvr_fast import ResponseGradients, Responses, Rollouts, gap_from_gradients, gradient_gap
from rlvr_fast.backends import available, torch_backend

LEVELS = ("logits", "hidden", "head")
BACKENDS = ("torch", "native", pytest.param("triton", marks=pytest.mark.gpu))
VOCABULARY, WIDTH = 67, 6


def head_tensors(generator, n_tokens: int, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """hidden [N, D], weight [V, D] and head options that leave nothing at its default."""
    hidden = torch.randn(n_tokens, width, generator=generator)
    weight = 2 * torch.randn(VOCABULARY, width, generator=generator) / math.sqrt(width)
    options = {"bias": torch.randn(VOCABULARY, generator=generator), "temperature": 0.8, "softcap": 4.0}
    return hidden, weight, options


def place_of(backend: str) -> torch.device:
    place = torch.device("cuda" if backend == "triton" else "cpu")
    if reason := available(place)[backend]:
        pytest.skip(reason)
    return place


def on(place: torch.device, options: dict) -> dict:
    return {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def assert_gap_matches(gap, exact: torch.Tensor, rollouts: Rollouts, error: float = 1e-5) -> int:
    """``gap``, of gradients that err by ``error``, against the reference's [R, K]; returns how many prompts had both
    classes."""
    pooled = [ref.pooled_noise([classes_of(rollouts, p, exact)[which] for p in range(rollouts.n_prompts)])
              for which in (0, 1)]
    assert gap.prompt_ids == rollouts.prompt_ids
    n_defined = 0
    for p, members in enumerate(rollouts.members):
        plus, minus = classes_of(rollouts, p, exact)
        assert (gap.n_correct[p], gap.n_incorrect[p]) == (len(plus), len(minus))
        assert gap.success_rate[p] == len(plus) / len(members)
        rows = exact[list(members)]
        gram = rows @ rows.T
        assert within(gap.gram[p].cpu(), gram, atol=2 * error * gram.diagonal().max().item())
        assert gap.defined[p] == (len(plus) > 0 and len(minus) > 0)
        if gap.vector is not None:
            for mean, own in ((gap.correct_mean, plus), (gap.incorrect_mean, minus)):
                if len(own):
                    assert within(mean[p].cpu(), own.mean(0), atol=error * own.abs().max().item() + 1e-7)
                else:
                    assert mean[p].isnan().all()
            assert bool(gap.vector[p].isnan().any()) == (not gap.defined[p])
        if not gap.defined[p]:
            assert all(column[p].isnan() for column in (gap.norm_sq, gap.norm_sq_naive, gap.stderr))
            continue
        n_defined += 1
        naive = ref.gap_norm_sq_naive(plus, minus)
        noise = [pool if len(own) == 1 else ref.class_noise(own)
                 for pool, own in zip(pooled, (plus, minus), strict=True)]
        scale = (naive + sum(noise)).item()
        assert within(gap.norm_sq_naive[p].cpu(), naive, atol=2 * error * scale)
        assert within(gap.norm_sq[p].cpu(), ref.gap_norm_sq_given_noise(plus, minus, *noise), atol=2 * error * scale)
        if min(len(plus), len(minus)) > 1:
            assert not gap.pooled[p]
            assert within(gap.norm_sq[p].cpu(), ref.gap_norm_sq(plus, minus), atol=2 * error * scale)
            assert within(gap.stderr[p].cpu(), ref.gap_stderr(plus, minus), atol=10 * error * scale)
        else:
            assert gap.pooled[p]
    return n_defined


# -- against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gap_matches_the_reference(backend, level, length_norm, generator):
    place = place_of(backend)
    rollouts = random_rollouts(40, 6, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden.to(place), weight.to(place), rollouts.to(place), level=level, length_norm=length_norm,
                       backend=backend, **on(place, options))
    exact = reference_gradients(hidden, weight, rollouts, level, length_norm, **options)
    assert assert_gap_matches(gap, exact, rollouts) >= 4
    assert 0 in rollouts.lengths.tolist()
    assert (gap.level, gap.length_norm) == (level, length_norm)
    assert within(gap.stats.logp.cpu(), ref.log_prob(ref.logits(hidden, weight, **options), rollouts.tokens), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_operands_lose_nothing_more(backend, level, dtype, generator):
    """The reference on the rounded operands: as tight as fp32, but for Triton's rounding of the derivatives.

    The magnitudes that make up an entry of a gradient exceed the largest entry fewer than four times here.
    """
    place = place_of(backend)
    rollouts = random_rollouts(24, 4, VOCABULARY, generator)
    hidden, weight, _ = head_tensors(generator, rollouts.n_tokens)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    gap = gradient_gap(hidden.to(place), weight.to(place), rollouts.to(place), level=level, backend=backend)
    error = 1e-5 + 4 * rounding_error(dtype, place) if backend == "triton" else 1e-5
    assert_gap_matches(gap, reference_gradients(hidden, weight, rollouts, level, True), rollouts, error)


@pytest.mark.parametrize(("n_responses", "longest", "width"), [(12, 3, 64), (12, 60, 5), (4, 500, 4)],
                         ids=["tokens fewer than D", "tokens more than D", "long responses"])
def test_head_level_by_pairs_and_by_tiles(n_responses, longest, width, generator):
    """Which of the two formulas is cheaper depends on the tokens of a prompt and D; both give the Gram matrix."""
    correct = torch.arange(n_responses) % 2 == 0
    rollouts = random_rollouts(n_responses, 1, VOCABULARY, generator, longest=longest, correct=correct)
    assert (rollouts.n_tokens <= width) == (width == 64)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens, width)
    gap = gradient_gap(hidden, weight, rollouts, level="head", **options)
    assert_gap_matches(gap, reference_gradients(hidden, weight, rollouts, "head", True, **options), rollouts)
    assert gap.vector is None
    assert gap.gradients is None


def test_head_gram_by_tiles_narrower_than_the_vocabulary(generator, monkeypatch):
    """A tile of seven vocabulary entries: the sum over tiles must not depend on it."""
    rollouts = random_rollouts(8, 2, VOCABULARY, generator, longest=20)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    whole = gradient_gap(hidden, weight, rollouts, level="head", backend="torch", **options)
    monkeypatch.setattr(torch_backend, "GRAM_TILE_FLOATS", 7 * 4 * WIDTH)
    tiled = gradient_gap(hidden, weight, rollouts, level="head", backend="torch", **options)
    for one, other in zip(whole.gram, tiled.gram, strict=True):
        assert within(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["logits", "hidden"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_blocks_of_responses_join_without_a_seam(backend, level, generator, monkeypatch):
    """Responses longer than a chunk of rows, and a few responses per block of the hidden level."""
    place_of(backend)
    monkeypatch.setattr(rf.gap, "SUM_BYTES", 4 * VOCABULARY * 3)
    rollouts = random_rollouts(10, 2, VOCABULARY, generator, longest=150)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, level=level, backend=backend, **options)
    assert_gap_matches(gap, reference_gradients(hidden, weight, rollouts, level, True, **options), rollouts)
    assert gap.stats.logp.shape == (rollouts.n_tokens,)


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_norm", [True, False])
def test_hidden_vectors_are_logits_vectors_through_the_head(length_norm, generator):
    rollouts = random_rollouts(20, 3, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    logits, through = (gradient_gap(hidden, weight, rollouts, level=level, length_norm=length_norm, **options)
                       for level in ("logits", "hidden"))
    assert within(through.gradients.vectors, logits.gradients.vectors @ weight, rtol=1e-4, atol=1e-5)


def test_head_level_with_constant_hidden_states_is_the_logits_level(generator):
    """h = 1 in one dimension: (∂logp/∂raw) hᵀ is ∂logp/∂raw."""
    rollouts = random_rollouts(20, 3, VOCABULARY, generator)
    hidden, weight = torch.ones(rollouts.n_tokens, 1), torch.randn(VOCABULARY, 1, generator=generator)
    head, logits = (gradient_gap(hidden, weight, rollouts, level=level) for level in ("head", "logits"))
    for one, other in zip(head.gram, logits.gram, strict=True):
        assert within(one, other, rtol=1e-4, atol=1e-6)


def test_a_response_without_length_normalisation_is_its_length_times_one_with(generator):
    rollouts = random_rollouts(20, 3, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    normed, plain = (gradient_gap(hidden, weight, rollouts, length_norm=flag, **options).gradients.vectors
                     for flag in (True, False))
    assert within(plain, normed * rollouts.lengths[:, None], rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(st.permutations(range(14)))
def test_order_of_the_responses_does_not_matter(order):
    generator = torch.Generator().manual_seed(3)
    rollouts = random_rollouts(14, 4, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    spans = [slice(*rollouts.bounds[i:i + 2]) for i in order]
    ids = [rollouts.prompt_ids[rollouts.prompt_index[i]] for i in order]
    ends = torch.tensor([0, *(rollouts.lengths[list(order)].cumsum(0).tolist())])
    shuffled = Rollouts.from_packed(torch.cat([rollouts.tokens[s] for s in spans]), ends,
                                    rollouts.rewards[list(order)], ids)
    one = gradient_gap(hidden, weight, rollouts, **options)
    other = gradient_gap(torch.cat([hidden[s] for s in spans]), weight, shuffled, **options)
    prompts = [other.prompt_ids.index(identity) for identity in one.prompt_ids]
    for name in ("norm_sq", "norm_sq_naive", "stderr", "vector", "success_rate"):
        left, right = getattr(one, name), getattr(other, name)[prompts]
        assert torch.equal(left.isnan(), right.isnan()), name
        assert within(left.nan_to_num(), right.nan_to_num(), rtol=1e-5, atol=1e-5), name


def test_unbiased_on_a_policy_whose_gap_is_known(generator):
    """500 groups of 8 from one enumerated policy: the mean of gap² over groups with two of each class is within 4
    standard errors of ‖g⁺ - g⁻‖² by enumeration, and the plug-in is not."""
    policy = TabularPolicy.random(3, 2, 3, generator)
    responses, rows = policy.responses, policy.prefix_rows()
    correct = torch.tensor([sum(response) % 2 == 0 for response in responses])
    probability = policy.probability()
    whole = policy.rollouts(correct)
    exact = reference_gradients(policy.hidden[rows], policy.weight, whole, "hidden", False, policy.bias)
    plus, minus = ((probability[c, None] * exact[c]).sum(0) / probability[c].sum() for c in (correct, ~correct))
    truth = (plus - minus).square().sum()

    picks = torch.multinomial(probability, 4000, replacement=True, generator=generator).tolist()
    tokens = torch.tensor([token for pick in picks for token in responses[pick]])
    ends = torch.tensor([0, *(len(responses[pick]) for pick in picks)]).cumsum(0)
    rollouts = Rollouts.from_packed(tokens, ends, correct[picks].float(), group_size=8)
    sampled = torch.cat([rows[whole.bounds[pick]:whole.bounds[pick + 1]] for pick in picks])
    gap = gradient_gap(policy.hidden[sampled].float(), policy.weight.float(), rollouts, length_norm=False,
                       bias=policy.bias.float())
    usable = gap.defined & ~gap.pooled
    assert usable.sum() > 100
    mean, error = gap.norm_sq[usable].mean(), gap.norm_sq[usable].std() / usable.sum().sqrt()
    assert abs(mean - truth) <= 4 * error
    assert gap.norm_sq_naive[usable].mean() - truth > 4 * error


# -- layouts, shards and micro-batches --------------------------------------------------------------------------------


def padded_batch(generator, rows: int = 12, columns: int = 9):
    ids = torch.randint(0, VOCABULARY, (rows, columns), generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    rewards = (torch.arange(rows) % 2).float()
    hidden = torch.randn(rows, columns, WIDTH, generator=generator)
    return ids, mask, rewards, hidden


@pytest.mark.parametrize("level", LEVELS)
def test_hidden_may_come_in_the_layout_of_the_batch(level, generator):
    """Padding may hold anything, NaN included."""
    ids, mask, rewards, hidden = padded_batch(generator)
    _, weight, options = head_tensors(generator, 0)
    rollouts = Rollouts.from_padded(ids, mask, rewards, group_size=6)
    packed = gradient_gap(hidden[mask], weight, rollouts, level=level, **options)
    padded = gradient_gap(hidden.masked_fill(~mask[..., None], torch.nan), weight, rollouts, level=level, **options)
    assert torch.equal(packed.norm_sq, padded.norm_sq)
    assert torch.equal(packed.stderr, padded.stderr)


def test_measuring_builds_no_autograd_graph(generator):
    ids, mask, rewards, hidden = padded_batch(generator)
    _, weight, options = head_tensors(generator, 0)
    rollouts = Rollouts.from_padded(ids, mask, rewards, group_size=6)
    options["bias"].requires_grad_()
    for level in LEVELS:
        gap = gradient_gap(hidden.requires_grad_(), weight.requires_grad_(), rollouts, level=level, **options)
        found = [gap.norm_sq, gap.stderr, gap.stats.logp, *gap.gram, *([] if gap.vector is None else [gap.vector])]
        assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_merge_into_the_whole(parts, generator):
    """Responses dealt to micro-batches at random, prompts cut through."""
    rollouts = random_rollouts(20, 4, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    whole = gradient_gap(hidden, weight, rollouts, **options)
    pieces = []
    for pile in partitions(range(20), generator, parts):
        spans = [slice(*rollouts.bounds[i:i + 2]) for i in pile]
        ids = [rollouts.prompt_ids[rollouts.prompt_index[i]] for i in pile]
        ends = torch.tensor([0, *(rollouts.lengths[pile].cumsum(0).tolist())])
        micro = Rollouts.from_packed(torch.cat([rollouts.tokens[s] for s in spans]), ends, rollouts.rewards[pile], ids)
        pieces.append(gradient_gap(torch.cat([hidden[s] for s in spans]), weight, micro, **options).gradients)
    merged = gap_from_gradients(ResponseGradients.merge(pieces), level="hidden", length_norm=True)
    prompts = [merged.prompt_ids.index(identity) for identity in whole.prompt_ids]
    for name in ("norm_sq", "norm_sq_naive", "stderr", "vector"):
        left, right = getattr(whole, name), getattr(merged, name)[prompts]
        assert torch.equal(left.isnan(), right.isnan())
        assert within(left.nan_to_num(), right.nan_to_num(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_token_shards_add_up_to_the_whole(level, generator):
    """Context parallelism: each rank holds some tokens of every response."""
    ids, mask, rewards, hidden = padded_batch(generator)
    _, weight, options = head_tensors(generator, 0)
    shards = []
    for columns in (slice(0, 4), slice(4, 9)):
        part = Rollouts.from_padded(ids[:, columns], mask[:, columns], rewards, group_size=6)
        shards.append(gradient_gap(hidden[:, columns], weight, part, level=level, length_norm=False, **options))
    whole = gradient_gap(hidden, weight, Rollouts.from_padded(ids, mask, rewards, group_size=6), level=level,
                         length_norm=False, **options)
    summed = gap_from_gradients(shards[0].gradients + shards[1].gradients, level=level, length_norm=False)
    assert within(summed.norm_sq, whole.norm_sq, rtol=1e-4, atol=1e-4)
    assert within(summed.stderr, whole.stderr, rtol=1e-4, atol=1e-4)
    assert within(summed.vector, whole.vector, rtol=1e-4, atol=1e-5)


# -- prompts without a gap, empty batches -----------------------------------------------------------------------------


def batch_of(generator, kinds: str = "msf"):
    """Prompts of six responses each: m(ixed), s(olved), f(ailed)."""
    verdicts = {"m": [1, 1, 0, 1, 0, 0], "s": [1] * 6, "f": [0] * 6}
    rewards = torch.tensor([float(v) for kind in kinds for v in verdicts[kind]])
    tokens = torch.randint(0, VOCABULARY, (len(rewards), 5), generator=generator)
    return Rollouts.from_padded(tokens, None, rewards, group_size=6)


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_of_one_class_have_no_gap_and_poison_nothing(level, generator):
    rollouts = batch_of(generator, "smfm")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, level=level, **options)
    assert gap.defined.tolist() == [False, True, False, True]
    assert not gap.pooled.any()
    summary = gap.summary()
    assert all(math.isfinite(value) for value in summary.values()), summary
    assert summary["rlvr/group/frac_mixed"] == 0.5
    assert summary["rlvr/group/frac_solved"] == summary["rlvr/group/frac_failed"] == 0.25
    keep = torch.arange(24).view(4, 6)[gap.defined].flatten()
    alone = Rollouts.from_padded(rollouts.tokens.view(24, 5)[keep], None, rollouts.rewards[keep], group_size=6)
    without = gradient_gap(hidden.view(24, 5, -1)[keep], weight, alone, level=level, **options).summary()
    for key in without:
        if "/gap/energy" not in key and "/group/" not in key:
            assert summary[key] == pytest.approx(without[key], rel=1e-5, abs=1e-8), key


def test_a_batch_without_any_gap_says_so(generator):
    rollouts = batch_of(generator, "sf")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    summary = gap.summary()
    assert math.isnan(summary["rlvr/gap/norm"])
    assert math.isnan(summary["rlvr/gap/batch_norm_sq"])
    assert summary["rlvr/group/frac_mixed"] == 0
    assert summary["rlvr/group/p_mean"] == 0.5
    assert all(value.isnan() for value in gap.batch_norm_sq())


def test_a_single_response_without_other_prompts_has_a_plug_in_value_only(generator):
    """Nobody to borrow the noise from: norm_sq is NaN, though both classes are there, and no mean counts it."""
    rollouts = Rollouts.from_packed(torch.arange(6), torch.tensor([0, 2, 4, 6]), torch.tensor([1.0, 0.0, 0.0]), [0] * 3)
    hidden, weight, options = head_tensors(generator, 6)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    assert gap.defined.item()
    assert gap.pooled.item()
    assert gap.norm_sq_naive.isfinite().all()
    assert gap.norm_sq.isnan().all()
    assert gap.stderr.isnan().all()
    assert math.isnan(gap.summary()["rlvr/gap/norm_sq"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_empty_batches(backend, level):
    place_of(backend)
    weight, none = torch.ones(5, 3), torch.zeros(0, dtype=torch.int64)
    nothing = Rollouts.from_packed(none, torch.tensor([0]), torch.zeros(0), [])
    gap = gradient_gap(torch.zeros(0, 3), weight, nothing, level=level, backend=backend)
    assert gap.norm_sq.shape == (0,)
    assert gap.gram == ()
    assert all(math.isnan(value) for value in gap.summary().values())
    assert "prompts=0" in repr(gap)
    silent = Rollouts.from_packed(none, torch.zeros(5, dtype=torch.int64), torch.tensor([1.0, 1.0, 0.0, 0.0]), [7] * 4)
    gap = gradient_gap(torch.zeros(0, 3), weight, silent, level=level, backend=backend)
    assert gap.norm_sq.tolist() == gap.stderr.tolist() == gap.norm_sq_naive.tolist() == [0.0]
    assert gap.stats.logp.shape == (0,)
    if level != "head":
        assert gap.vector.tolist() == [[0.0] * gap.vector.shape[1]]


# -- the batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [None, torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0])])
def test_batch_norm_sq_is_debiased_with_a_jackknife_over_prompts(weighting, generator):
    rollouts = batch_of(generator, "msmfm")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    usable = gap.defined
    exact = reference_gradients(hidden, weight, rollouts, "hidden", True, **options)
    pairs = [classes_of(rollouts, p, exact) for p in usable.nonzero()[:, 0].tolist()]
    vectors = torch.stack([ref.gap_vector(*pair) for pair in pairs])
    naive = torch.stack([ref.gap_norm_sq_naive(*pair) for pair in pairs])
    unbiased = torch.stack([ref.gap_norm_sq(*pair) for pair in pairs])
    raw = torch.ones(len(pairs), dtype=torch.float64) if weighting is None else weighting[usable].double()

    def theta(keep):
        w = raw[keep] / raw[keep].sum()
        return ref.batch_gap_norm_sq(vectors[keep], naive[keep], unbiased[keep], w)

    everything = torch.arange(len(pairs))
    left = torch.stack([theta(everything[everything != p]) for p in everything])
    norm_sq, stderr = gap.batch_norm_sq(weighting)
    assert within(norm_sq, theta(everything), atol=2e-5 * naive.sum().item())
    expected = ((len(pairs) - 1) * left.var(correction=0)).sqrt()
    assert within(stderr, expected, atol=1e-4 * naive.sum().item())


def test_batch_of_one_defined_prompt_has_no_error_bar(generator):
    rollouts = batch_of(generator, "msf")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    norm_sq, stderr = gap.batch_norm_sq()
    assert within(norm_sq, gap.norm_sq[0], rtol=1e-5, atol=1e-7)
    assert stderr.isnan()


def test_a_weight_of_zero_leaves_a_prompt_out(generator):
    rollouts = batch_of(generator, "mmm")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    two = Rollouts.from_padded(rollouts.tokens.view(18, 5)[:12], None, rollouts.rewards[:12], group_size=6)
    alone = gradient_gap(hidden[:60], weight, two, **options)
    for one, other in zip(gap.batch_norm_sq(torch.tensor([1.0, 1.0, 0.0])), alone.batch_norm_sq(), strict=True):
        assert within(one, other, rtol=1e-5, atol=1e-8)


def test_alignment_is_the_inner_product_with_the_gap(generator):
    rollouts = batch_of(generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    direction = torch.randn(WIDTH, generator=generator)
    plus, minus = classes_of(rollouts, 0, reference_gradients(hidden, weight, rollouts, "hidden", True, **options))
    aligned = gap.alignment(direction)
    assert within(aligned[0], ref.alignment(direction, ref.gap_vector(plus, minus)), atol=1e-5)
    assert aligned[1:].isnan().all()
    assert within(gap.alignment(gap.vector[0])[0], gap.norm_sq_naive[0], rtol=1e-5)


@pytest.mark.parametrize("method", ["batch_norm_sq", "alignment"])
def test_head_level_keeps_no_vectors_and_says_so(method, generator):
    rollouts = batch_of(generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, level="head", **options)
    with pytest.raises(ValueError, match="level 'head' has none"):
        getattr(gap, method)(*([torch.ones(WIDTH)] if method == "alignment" else []))
    assert "rlvr/gap/batch_norm_sq" not in gap.summary()


# -- what it prints ---------------------------------------------------------------------------------------------------


def test_summary_is_flat_and_safe_for_loggers(generator):
    rollouts = batch_of(generator, "mmsf")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    gap = gradient_gap(hidden, weight, rollouts, **options)
    summary = gap.summary()
    assert all(type(value) is float for value in summary.values())
    assert all(key.startswith("rlvr/") for key in summary)
    assert not any(word in key for key in summary for word in ("min", "max"))  # loggers reduce by these substrings
    mean = gap.norm_sq[:2].mean().item()
    assert summary["rlvr/gap/norm_sq"] == pytest.approx(mean)
    assert summary["rlvr/gap/norm"] == pytest.approx(max(mean, 0.0) ** 0.5)
    assert summary["rlvr/gap/norm_sq_stderr"] == pytest.approx(gap.stderr[:2].square().sum().sqrt().item() / 2)
    assert summary["rlvr/gap/norm_sq_naive"] == pytest.approx(gap.norm_sq_naive[:2].mean().item())
    assert summary["rlvr/signal_to_noise"] == pytest.approx(mean / (gap.norm_sq_naive - gap.norm_sq)[:2].mean().item())
    energy = gap.gradients.vectors.double().square().sum(1)
    assert summary["rlvr/gap/energy_pos"] == pytest.approx(energy[rollouts.correct].mean().item())
    assert summary["rlvr/gap/energy_neg"] == pytest.approx(energy[~rollouts.correct].mean().item())
    assert summary["rlvr/group/p_mean"] == 0.5


def test_repr_is_a_short_table(generator):
    rollouts = batch_of(generator, "mmsfmmsfmmsf")
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    lines = repr(gradient_gap(hidden, weight, rollouts, **options)).splitlines()
    assert "level=hidden" in lines[0]
    assert "defined=6" in lines[0]
    assert len(lines) == 2 + 10 + 1
    assert lines[-1] == "... 2 more"
    assert "nan" in lines[4]


def test_results_repeat_bit_for_bit(generator):
    rollouts = random_rollouts(30, 5, VOCABULARY, generator)
    hidden, weight, options = head_tensors(generator, rollouts.n_tokens)
    one, two = (gradient_gap(hidden, weight, rollouts, **options) for _ in range(2))
    assert torch.equal(one.gradients.vectors, two.gradients.vectors)
    assert torch.equal(one.norm_sq.nan_to_num(), two.norm_sq.nan_to_num())


def test_equal_responses_leave_finite_errors():
    """With one right answer all correct gradients are equal: their noise is 0, and rounding must not make it less,
    or the error of a prompt that borrows it is the root of a negative number."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        correct = torch.rand(64, generator=generator) < 0.6
        prompt = torch.arange(64) // 8
        vectors = torch.randn(8, 2, 4, generator=generator)[prompt, correct.long()]
        gradients = ResponseGradients(Responses(correct, prompt, tuple(range(8))), vectors)
        gap = rf.gap_from_gradients(gradients, level="hidden", length_norm=True)
        assert gap.stderr[gap.defined].isfinite().all()
        assert torch.allclose(gap.norm_sq[gap.defined], gap.norm_sq_naive[gap.defined], rtol=1e-6)
