"""The row pass: every kernel that makes token statistics and derivatives out of logits, against the specification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, EPS, FP16
from policies import within
from row_passes import ALL, DTYPES, FP32, RowPass, Rows, Truth

import rlvr_fast as rf
from rlvr_fast.backends import TokenPass, row_pass, triton_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


ROWS = (Rows(1), Rows(2, BF16), Rows(33), Rows(101, BF16, 0.7), Rows(101, FP16, 2.0, 5.0), Rows(130, masked=True),
        Rows(257, softcap=30.0, spread=10.0), Rows(264, BF16, 0.3, 3.0, masked=True), Rows(520, n=2))


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """The same for every test of the session, so that what is compiled there is compiled once."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(params=ALL)
def implementation(request, directory) -> RowPass:
    return RowPass(request.param, directory)


# -- against the specification ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_statistics_match_the_reference(implementation, rows):
    logits, tokens = rows.tensors()
    actual, _ = implementation.run(logits, tokens, **rows.options)
    Truth(logits, tokens, **rows.options).check(actual)
    assert (actual.logp <= 0).all()


@pytest.mark.parametrize("block", ["in place", *DTYPES], ids=str)
@pytest.mark.parametrize("rows", ROWS[2:-1], ids=str)
def test_derivatives_match_the_reference(implementation, rows, block):
    """Aligned rows or not: the offset and the padding are those of a slice of a larger buffer."""
    logits, tokens = rows.tensors()
    offset, padding = (1, 0) if rows.vocabulary % 2 else (0, 24)
    actual, derivatives = implementation.run(logits, tokens, block=block, offset=offset, padding=padding,
                                             **rows.options)
    Truth(logits, tokens, **rows.options).check(actual, derivatives)


@pytest.mark.parametrize(("offset", "padding"), [(0, 0), (8, 8), (1, 0), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(implementation, dtype, offset, padding):
    """V = 96 moves in whole vectors where base and stride allow it, and entry by entry where they do not."""
    logits, tokens = Rows(96, dtype).tensors()
    actual, derivatives = implementation.run(logits, tokens, block="in place", offset=offset, padding=padding)
    Truth(logits, tokens).check(actual, derivatives)


# -- where formulas fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_certain_tokens_keep_their_digits(implementation, dtype):
    """p = 1 - 5e-4, ..., 1 - 5e-11, where 1 - p has no digits left."""
    logits = torch.linspace(-2, 1, 70).bfloat16().float().repeat(4, 1)
    tokens = torch.full((4,), 41)
    logits[:, 41] = torch.tensor([12.0, 18.0, 23.0, 28.0])
    truth = Truth(logits, tokens)
    actual, derivatives = implementation.run(logits.to(dtype), tokens, block=FP32)
    assert (1 - truth.fields["off_mass"]).float().max() == 1.0
    for name in ("logp", "off_mass", "entropy", "score_sq"):
        assert within(getattr(actual, name), truth.fields[name], rtol=8 * truth.error + 32 * EPS), name
    truth.check(actual, derivatives)


@pytest.mark.parametrize("offset", [1e4, -1e4, -300.0])
def test_a_common_offset(implementation, offset):
    """A maximum that starts at 0, or padding that counts as a logit of 0, would swallow or add mass."""
    logits, tokens = Rows(101).tensors()
    logits = logits + offset
    actual, derivatives = implementation.run(logits, tokens, block=FP32)
    Truth(logits, tokens).check(actual, derivatives)


def test_logits_of_thousands(implementation):
    logits, tokens = Rows(101, spread=4000.0).tensors()
    Truth(logits, tokens).check(*implementation.run(logits, tokens, block="in place"))


def test_equal_logits(implementation):
    logits, tokens = torch.full((2, 129), 3.25), torch.tensor([0, 128])
    actual, derivatives = implementation.run(logits, tokens, block=FP32)
    Truth(logits, tokens).check(actual, derivatives)


def test_a_token_without_rivals(implementation):
    """All other logits at -inf: certain, no entropy, no derivative."""
    logits, tokens = torch.full((1, 67), -torch.inf), torch.tensor([5])
    logits[0, 5] = -2.0
    actual, derivatives = implementation.run(logits, tokens, block=FP32)
    assert torch.equal(torch.stack(actual)[:, 0], torch.tensor([0.0, -2.0, 0.0, 1.0, 0.0, 0.0]))
    assert (derivatives == 0).all()


def test_an_impossible_token(implementation):
    """Its own logit at -inf: logp is -inf, everything else is that of the other tokens."""
    logits, tokens = Rows(67).tensors()
    logits.scatter_(1, tokens[:, None], -torch.inf)
    truth = Truth(logits, tokens)
    actual, derivatives = implementation.run(logits, tokens, block=FP32)
    assert (actual.logp == -torch.inf).all()
    assert (actual.off_mass == 1).all()
    finite = TokenPass(**truth.fields)._replace(logp=torch.zeros(3), score_sq=actual.score_sq.double())
    truth.fields = finite._asdict()
    truth.check(actual._replace(logp=torch.zeros(3)))
    others = torch.softmax(logits.double(), 1)
    assert within(derivatives.scatter(1, tokens[:, None], 0.0), -others, rtol=4 * truth.error + 16 * EPS, atol=1e-37)


def test_a_token_of_another_shard(implementation):
    """Id -1: logp -inf, off-target mass 1, and no target in the score or in the derivatives."""
    logits, _ = Rows(67, softcap=5.0).tensors()
    actual, derivatives = implementation.run(logits, torch.full((3,), -1), softcap=5.0, block=FP32)
    raw = logits.double()
    p, slope = torch.softmax(5 * torch.tanh(raw / 5), 1), 1 / torch.cosh(raw / 5) ** 2
    assert (actual.logp == -torch.inf).all()
    assert (actual.off_mass == 1).all()
    assert within(actual.lse, (5 * torch.tanh(raw / 5)).logsumexp(1), rtol=1e-6)
    assert within(actual.score_sq, (p * slope).square().sum(1), rtol=1e-5)
    assert within(derivatives, -p * slope, rtol=2e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_row_alone(implementation, wrong):
    logits, tokens = Rows(67).tensors()
    tokens[1] = 3
    clean, _ = implementation.run(logits, tokens)
    logits[1, 40] = wrong
    actual, _ = implementation.run(logits, tokens)
    assert torch.stack(actual)[:, 1].isnan().all()
    keep = torch.tensor([0, 2])
    assert torch.equal(torch.stack(actual)[:, keep], torch.stack(clean)[:, keep])


def test_a_row_without_a_finite_logit_is_nan(implementation):
    actual, _ = implementation.run(torch.full((1, 40), -torch.inf), torch.tensor([3]))
    assert not torch.stack(actual).isfinite().all()


def test_results_repeat_bit_for_bit(implementation):
    logits, tokens = Rows(520, BF16, n=2).tensors()
    (first, a), (second, b) = (implementation.run(logits, tokens, block="in place") for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert torch.equal(a, b)


# -- dispatch ----------------------------------------------------------------------------------------------------------


def test_a_cpu_takes_torch_and_the_others_say_why_not():
    logits, tokens = Rows(33).tensors()
    assert row_pass.resolve("auto", logits, False) == "torch"
    with pytest.raises(ValueError, match=r"'cuda' cannot run: .* needs an NVIDIA GPU"):
        row_pass.logits_pass(logits, tokens, 1.0, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, cuda"):
        rf.token_stats_from_logits(logits, tokens, backend="native")


@pytest.mark.interpreter
@pytest.mark.skipif(triton_backend.unavailable(torch.device("cpu")) is not None, reason="Triton is not interpreted")
def test_the_public_function_reaches_the_kernel():
    logits, tokens = Rows(33).tensors()
    expected = rf.token_stats_from_logits(logits, tokens, backend="torch")
    actual = rf.token_stats_from_logits(logits.T.contiguous().T, tokens, backend="triton")
    for name in ("logp", "lse", "entropy", "sum_p_sq", "score_sq"):
        assert within(getattr(actual, name), getattr(expected, name), rtol=2e-6, atol=1e-6), name
    assert rf.token_stats_from_logits(logits[:0], tokens[:0], backend="triton").logp.shape == (0,)


def test_the_table_sends_what_was_measured_to_cuda(monkeypatch):
    """As on a GPU of the table's kind, without one: the meta device has the shapes."""
    monkeypatch.setattr(row_pass, "unavailable", lambda name, device: None)
    monkeypatch.setattr("rlvr_fast.kernels.config.architecture", lambda device: "sm90")
    monkeypatch.setattr(row_pass, "CUDA_IS_FASTER", (("sm90", FP32, True, range(100_000, 200_000)),))

    class OnGpu:
        device = torch.device("cuda", 0)

        def __init__(self, vocabulary, dtype):
            self.shape, self.dtype = (8, vocabulary), dtype

    assert row_pass.resolve("auto", OnGpu(152064, FP32), True) == "cuda"
    assert row_pass.resolve("auto", OnGpu(152064, FP32), False) == "triton"
    assert row_pass.resolve("auto", OnGpu(152064, BF16), True) == "triton"
    assert row_pass.resolve("auto", OnGpu(49152, FP32), True) == "triton"


def test_a_block_must_be_the_logits_or_apart_from_them():
    logits, tokens = Rows(33).tensors()
    buffer = torch.zeros(3, 80)
    for block, error, message in (
            (torch.zeros(3, 32), ValueError, r"block must have shape \[3, 33\]"),
            (torch.zeros(3, 33, dtype=torch.float64), TypeError, "block must have dtype"),
            (torch.zeros(33, 3).T, ValueError, "block must have adjacent elements"),
            (torch.zeros(1, 33).expand(3, 33), ValueError, "rows apart")):
        with pytest.raises(error, match=message):
            row_pass.logits_pass(logits, tokens, 1.0, block=block)
    with pytest.raises(ValueError, match="block must be the logits themselves"):
        row_pass.logits_pass(buffer[:, :33], tokens, 1.0, block=buffer[:, 7:40])


# -- on a GPU ---------------------------------------------------------------------------------------------------------

KERNELS = ("triton-cuda", "cuda-cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("vocabulary", [33, 49152, 129920, 151936, 152064, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_vocabularies_on_a_gpu(name, dtype, vocabulary, directory):
    """In place and in rows that are a slice of a larger buffer, twice, bit for bit."""
    kernel = RowPass(name, directory)
    logits, tokens = Rows(vocabulary, dtype, n=5).tensors()
    truth = Truth(logits, tokens)
    for options in ({}, {"block": "in place"}, {"block": BF16, "padding": 16}, {"block": FP32, "padding": 3}):
        actual, derivatives = kernel.run(logits, tokens, **options)
        truth.check(actual, derivatives)
        again, same = kernel.run(logits, tokens, **options)
        assert torch.equal(torch.stack(actual), torch.stack(again))
        assert derivatives is None or torch.equal(derivatives, same)


@pytest.mark.gpu
@pytest.mark.parametrize("smallest_cluster", [2, 4, 8])
def test_larger_clusters_on_a_gpu(smallest_cluster, directory):
    logits, tokens = Rows(152064, BF16, n=64).tensors()
    actual, derivatives = RowPass("cuda-cuda", directory).run(logits, tokens, block="in place",
                                                          smallest_cluster=smallest_cluster)
    Truth(logits, tokens).check(actual, derivatives)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_memory_accesses_stay_inside(name, directory):
    """What a memory checker runs: few and small, aligned or not, resident and, past any cluster, streaming."""
    kernel = RowPass(name, directory)
    for dtype, block in ((FP32, None), (FP32, "in place"), (FP32, BF16), (BF16, None), (BF16, "in place"), (BF16, FP32),
                         (FP16, "in place")):
        for vocabulary, offset in ((33, 1), (4096, 0), (70001, 1), (500000, 0)):
            logits, tokens = Rows(vocabulary, dtype, n=2).tensors()
            actual, _ = kernel.run(logits, tokens, softcap=30.0, block=block, offset=offset)
            assert torch.stack(actual).isfinite().all()
