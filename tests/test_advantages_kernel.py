"""The fused advantages kernel, interpreted on the CPU or run on a GPU, against the float64 specification."""

import inspect
import itertools

import pytest
import torch
from advantage_batches import (
    BATCHES,
    MAX_LENGTH,
    assert_close,
    option_cases,
    ragged,
    reference_advantages,
    reference_weights,
)

from rlvr_fast.advantages import AGGREGATIONS, ESTIMATORS, advantages, advantages_and_weights, loss_weights

triton = pytest.importorskip("triton")
kernel_module = pytest.importorskip("rlvr_fast.kernels.advantages")

# fp32 sums of some 20 terms, a square root and a division: about 10 roundings of 6e-8, with a margin of 3.
RELATIVE = 2e-6
INTERLEAVED = ragged(4, n_responses=20, n_prompts=4, longest=20, binary=False)
OPTION_BATCHES = {name: BATCHES[name] for name in ("one response", "no short response", "negative rewards")}
EDGES = {name: BATCHES[name] for name in (
    "no responses", "one-response groups", "equal rewards but for an empty response", "all empty", "one token",
    "a prompt without tokens", "large offset", "differences of one rounding step", "mixed magnitudes",
    "negative rewards",
)}
COMPILED = isinstance(kernel_module.advantages_kernel, triton.JITFunction)
needs_interpreter = pytest.mark.skipif(COMPILED, reason="needs TRITON_INTERPRET=1; test_on_a_gpu runs the kernel there")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks smaller than the batch, so that every sweep takes several turns and ends inside a block."""
    monkeypatch.setattr(kernel_module, "RESPONSE_BLOCK", 16)
    monkeypatch.setattr(kernel_module, "TOKEN_BLOCK", 8)


def random_advantages(rollouts):
    return torch.randn(rollouts.n_responses, generator=torch.Generator().manual_seed(3))


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sweeps_over_several_blocks(estimator):
    actual = advantages(INTERLEAVED, estimator, backend="triton")
    assert_close(actual, reference_advantages(INTERLEAVED, estimator), RELATIVE)


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize(("estimator", "options"), option_cases())
def test_options_match_the_specification(estimator, options):
    for name, rollouts in OPTION_BATCHES.items():
        actual = advantages(rollouts, estimator, backend="triton", **options)
        assert_close(actual, reference_advantages(rollouts, estimator, **options), RELATIVE, name)


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_at_the_edges(estimator):
    for name, rollouts in EDGES.items():
        actual = advantages(rollouts, estimator, backend="triton")
        assert_close(actual, reference_advantages(rollouts, estimator), RELATIVE, name)


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_weights_match_the_specification(aggregation):
    for rollouts in (INTERLEAVED, *EDGES.values()):
        given = random_advantages(rollouts)
        weights = loss_weights(rollouts, given, aggregation, max_length=MAX_LENGTH, backend="triton")
        assert_close(weights, reference_weights(rollouts, given, aggregation), RELATIVE)


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize(("estimator", "aggregation"), [
    ("grpo", "grpo"), ("dr_grpo", "dr_grpo"), ("reinforce_pp_baseline", "dapo"), ("vl_norm", "dr_grpo"),
    ("rloo", "prompt_mean"), ("grpo", "vl_norm"),
])
def test_one_launch_writes_what_two_write(estimator, aggregation):
    rollouts = BATCHES["negative rewards"]
    both = advantages_and_weights(rollouts, estimator, aggregation, max_length=MAX_LENGTH, alpha=0.75, backend="triton")
    own = {"alpha": 0.75} if estimator == "vl_norm" else {}
    alone = advantages(rollouts, estimator, backend="triton", **own)
    weights = loss_weights(rollouts, alone, aggregation, max_length=MAX_LENGTH, alpha=0.75, backend="triton")
    assert torch.equal(both[0], alone)
    assert torch.equal(both[1], weights)


@pytest.mark.interpreter
@needs_interpreter
def test_given_advantages_are_left_alone():
    """Strided and in half precision: the launch works on a copy where it must, and writes only weights."""
    wide = random_advantages(INTERLEAVED).bfloat16().repeat_interleave(2)
    before = wide.clone()
    weights = loss_weights(INTERLEAVED, wide[::2], backend="triton")
    assert_close(weights, reference_weights(INTERLEAVED, before[::2], "grpo"), RELATIVE)
    assert torch.equal(wide, before)


def test_ahead_of_time_entries_cover_the_kernel():
    parameters = set(inspect.signature(kernel_module.advantages_kernel.fn).parameters)
    entries = kernel_module.aot_specializations()
    assert len({entry["name"] for entry in entries}) == len(entries)
    for entry in entries:
        assert set(entry["signature"]) | set(entry["constexprs"]) == parameters
        assert not set(entry["signature"]) & set(entry["constexprs"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_gpu(estimator):
    large = ragged(9, n_responses=3000, n_prompts=200, longest=1500)
    for rollouts, aggregation in itertools.product((*BATCHES.values(), large), AGGREGATIONS):
        if estimator == aggregation == "vl_norm":
            continue
        on_gpu = rollouts.to("cuda")
        found = advantages_and_weights(on_gpu, estimator, aggregation, max_length=MAX_LENGTH)
        again = advantages_and_weights(on_gpu, estimator, aggregation, max_length=MAX_LENGTH)
        expected = advantages_and_weights(rollouts, estimator, aggregation, max_length=MAX_LENGTH, backend="torch")
        for got, repeated, want in zip(found, again, expected, strict=True):
            assert torch.equal(got, repeated)
            # 3000 terms over 1024 lanes, and hardware sqrt, exp2 and log2 of a few units in the last place.
            assert_close(got.cpu(), want.double(), 5 * RELATIVE)
