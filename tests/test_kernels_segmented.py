"""The segmented weight gradient on the GPU where there is one, else interpreted, against a float64 loop.

Tolerances. Products of 16-bit operands are exact in float32 and sums are float32, so an entry of G_i errs by at most
(T + 16)·2^-23 Σ_t |b_t| |a_t|. Inner products have that error twice, relative to the product of the two sizes; the 16
are for the sums over entries. Of 16-bit operands they lack the digits behind two bf16 terms and the product of the two
second ones: 3·2^-18 ‖G_i‖ ‖G_j‖ where conversion rounds (a GPU), 3·2^-14 where it cuts off (the interpreter).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import pytest
import torch
from kernel_cases import BF16, EPS, FP16, assert_close_to_terms

from rlvr_fast.backends import triton_segmented
from rlvr_fast.backends.triton_segmented import prompt_products, segmented_gradient, supported
from rlvr_fast.kernels.segmented_gradient import GradientTile, gradient_tile
from rlvr_fast.model_gap.segmented import segmented_gram

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)


@dataclass
class Layer:
    """Rows of a layer and whose they are, on the host: b [N, d_out], a [N, d_in], spans of the responses prompt by
    prompt."""

    b: torch.Tensor
    a: torch.Tensor
    spans: list[tuple[int, int]]
    prompts: list[int]  # responses of each
    direction: torch.Tensor

    def run(self, device, *, gradient=True, direction=True):
        """(gram, dot, gradient) on the host; the gradient begins at 1."""
        total = torch.ones(self.b.shape[1], self.a.shape[1], device=device) if gradient else None
        starts, stops = torch.tensor(self.spans, dtype=torch.int64).reshape(-1, 2).T.contiguous().to(device)
        cu_prompts = torch.tensor([0, *accumulate(self.prompts)], dtype=torch.int32, device=device)
        gram, dot = segmented_gradient(
            self.b.to(device), self.a.to(device), starts, stops, cu_prompts, n_max=max(self.prompts, default=0),
            direction=self.direction.to(device) if direction else None, gradient=total)
        return gram.cpu(), None if dot is None else dot.cpu(), None if total is None else total.cpu()

    def gradients(self, magnitudes: bool = False) -> torch.Tensor:
        """[R, d_out, d_in] float64, or of the factors' magnitudes."""
        b, a = (x.double().abs() if magnitudes else x.double() for x in (self.b, self.a))
        own = [b[start:stop].T @ a[start:stop] for start, stop in self.spans]
        return torch.stack(own) if own else torch.zeros(0, self.b.shape[1], self.a.shape[1], dtype=torch.float64)

    def check(self, device, gram, dot, gradient) -> None:
        exact, sizes = self.gradients(), self.gradients(magnitudes=True)
        longest = max((stop - start for start, stop in self.spans), default=0)
        added = (longest + 16) * EPS
        split = 0.0 if self.b.dtype == torch.float32 else 3 * 2.0 ** (-14 if device.type == "cpu" else -18)
        norms, magnitudes = exact.flatten(1).norm(dim=1), sizes.flatten(1).norm(dim=1)
        stop = 0
        for n in self.prompts:
            start, stop = stop, stop + n
            own = exact[start:stop].flatten(1)
            excess = ((gram[start:stop, :n] - own @ own.T).abs() - split * norms[start:stop, None] * norms[start:stop]
                      - 2 * added * magnitudes[start:stop, None] * magnitudes[start:stop])
            assert (excess <= 1e-30).all(), f"Gram beyond the allowed by {excess.max():.3g}"
            assert (gram[start:stop, n:] == 0).all()
        if dot is not None:
            towards = self.direction.double()
            assert_close_to_terms(dot, (exact * towards).sum((1, 2)), (sizes * towards.abs()).sum((1, 2)), 2 * added)
        if gradient is not None:
            assert_close_to_terms(gradient, 1 + exact.sum(0), 1 + sizes.sum(0), added + len(self.spans) * EPS)


def draw(generator, lengths, prompts, d_out=21, d_in=37, dtype=torch.float32) -> Layer:
    """Rows of normal entries, response after response."""
    ends = [0, *accumulate(lengths)]
    b, a = (torch.randn(ends[-1], width, generator=generator).to(dtype) for width in (d_out, d_in))
    spans = list(pairwise(ends))
    return Layer(b, a, spans, prompts, torch.randn(d_out, d_in, generator=generator))


def assert_matches(layer: Layer, device) -> None:
    layer.check(device, *layer.run(device))


@DTYPES
@pytest.mark.parametrize(("lengths", "prompts"), [
    ([1], [1]), ([33, 16, 5], [3]), ([0, 17, 1], [3]), ([0], [1]), ([3, 2, 40, 1, 0, 0], [2, 1, 3]),
    ([2, 3], [0, 2, 0])], ids=str)
def test_uneven_responses(lengths, prompts, dtype, device, generator):
    """Empty ones, shorter than a block of tokens, just one; prompts of one response and of none."""
    assert_matches(draw(generator, lengths, prompts, dtype=dtype), device)


@DTYPES
@pytest.mark.parametrize(("d_out", "d_in"), [(1, 1), (1, 70), (16, 32), (17, 33), (50, 1), (18, 70)], ids=str)
def test_shapes_of_the_weight(d_out, d_in, dtype, device, generator):
    assert_matches(draw(generator, [6, 4, 1], [2, 1], d_out, d_in, dtype), device)


@pytest.mark.parametrize("n", [15, 16, 17, 33, 64])
def test_sizes_of_a_group(n, device, generator):
    """Each padded Gram matrix, with another prompt before and after."""
    lengths = torch.randint(0, 4, (n + 5,), generator=generator).tolist()
    assert_matches(draw(generator, lengths, [2, n, 3], 18, 20, BF16), device)


@DTYPES
def test_rows_in_any_order_and_of_nobody(dtype, device, generator):
    """A prompt's responses apart from each other, rows between them that hold NaN."""
    layer = draw(generator, [50], [1], dtype=dtype)
    layer.spans, layer.prompts = [(40, 47), (3, 20), (25, 25), (21, 23), (0, 3)], [2, 3]
    for start, stop in ((20, 21), (23, 40), (47, 50)):
        layer.b[start:stop] = layer.a[start:stop] = torch.nan
    assert_matches(layer, device)


def test_a_broken_response_spoils_nothing_but_its_own(device, generator):
    layer = draw(generator, [5, 7, 6, 3], [3, 1], dtype=BF16)
    layer.b[6, 4], layer.a[8, 2] = torch.inf, torch.nan
    gram, dot, gradient = layer.run(device)
    fine = torch.tensor([True, False, True])
    assert gram[1, :3].isnan().all()
    assert gram[:3, 1].isnan().all()
    assert dot[1].isnan()
    assert gradient.isnan().any()
    layer.b[5:12] = layer.a[5:12] = 0
    clean_gram, clean_dot, _ = layer.run(device)
    assert torch.equal(gram[:3][fine][:, fine], clean_gram[:3][fine][:, fine])
    assert torch.equal(gram[3], clean_gram[3])
    assert torch.equal(dot[[0, 2, 3]], clean_dot[[0, 2, 3]])


@DTYPES
def test_responses_that_cancel(dtype, device, generator):
    """Two responses of opposite gradients: the total is 0 to the rounding of what was added, their product is not."""
    layer = draw(generator, [9, 9], [2], dtype=dtype)
    layer.b[9:], layer.a[9:] = -layer.b[:9], layer.a[:9]
    gram, dot, gradient = layer.run(device)
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(gram[0], -gram[1])
    assert torch.equal(gram, gram.T)
    layer.check(device, gram, dot, gradient)


@DTYPES
def test_an_outlier_channel_and_a_wide_range(dtype, device, generator):
    """One input channel a thousand times the others, tokens from 2^-12 to 2^12: G_i beyond fp16's largest number."""
    layer = draw(generator, [12, 20, 4], [3], dtype=dtype)
    scale = torch.logspace(-12, 12, len(layer.b), base=2.0)
    layer.b *= scale[:, None].to(dtype)
    layer.a[:, 5] *= 1000
    assert layer.gradients().abs().max() > 65504
    assert_matches(layer, device)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("direction", [True, False], ids=["direction", "no direction"])
def test_only_what_is_asked_for(gradient, direction, device, generator):
    layer = draw(generator, [5, 7, 6], [2, 1], dtype=BF16)
    found = layer.run(device, gradient=gradient, direction=direction)
    assert (found[1] is not None, found[2] is not None) == (direction, gradient)
    layer.check(device, *found)


@DTYPES
@pytest.mark.parametrize("kind", [torch.float64, BF16], ids=str)
def test_the_direction_has_a_dtype_of_its_own(kind, dtype, device, generator):
    """And may be a transposed view."""
    layer = draw(generator, [5, 7, 6], [2, 1], dtype=dtype)
    layer.direction = layer.direction.to(kind)
    assert_matches(layer, device)
    layer.direction = layer.direction.T.contiguous().T
    assert_matches(layer, device)


@DTYPES
def test_rows_of_wider_tensors(dtype, device, generator):
    """Misaligned column slices, and rows in steps of two: q, k and v of one projection. Around them is NaN."""
    wide = draw(generator, [10, 12, 14], [3], 63, 63, dtype)
    for x, inner in ((wide.b, wide.b[:, 3:24]), (wide.a, wide.a[:, 7:44]),
                     (wide.direction, wide.direction[3:24, 7:44])):
        own = inner.clone()
        x.fill_(torch.nan)
        inner.copy_(own)
    layer = replace(wide, b=wide.b.to(device)[::2, 3:24], a=wide.a.to(device)[::2, 7:44],
                    spans=[(0, 5), (5, 11), (11, 18)], direction=wide.direction[3:24, 7:44])
    narrow = replace(layer, b=layer.b.contiguous(), a=layer.a.contiguous())
    found, expected = layer.run(device), narrow.run(device)
    narrow.b, narrow.a = narrow.b.cpu(), narrow.a.cpu()
    narrow.check(device, *found)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@DTYPES
def test_repeats_bit_for_bit(dtype, device, generator):
    layer = draw(generator, [5, 17, 6, 3, 1], [2, 3], 17, 33, dtype)
    for first, second in zip(layer.run(device), layer.run(device), strict=True):
        assert torch.equal(first, second)


def test_equal_responses_have_equal_products(device, generator):
    """Whichever place they have in their prompt, and however many rows they begin after."""
    layer = draw(generator, [7] * 4, [4], dtype=BF16)
    layer.b[7:], layer.a[7:] = layer.b[:7].repeat(3, 1), layer.a[:7].repeat(3, 1)
    gram, dot, _ = layer.run(device)
    assert (gram == gram[0, 0]).all()
    assert (dot == dot[0]).all()


@pytest.mark.parametrize("programs", [1, 3, 20])
@pytest.mark.parametrize(("d_out", "d_in"), [(20, 70), (10, 12)], ids=["many tiles", "one tile"])
def test_any_number_of_programs(programs, d_out, d_in, device, generator, monkeypatch):
    """Fewer than tiles, and so many that prompts are shared out: what is added up is the same."""
    monkeypatch.setattr(triton_segmented, "_programs", lambda device, tile: programs)
    assert_matches(draw(generator, [5, 1, 6, 3, 4], [2, 1, 2], d_out, d_in, BF16), device)


def test_the_stash_is_bounded(device, generator, monkeypatch):
    """Where a prompt's tiles take more than the bound, one program does it all."""
    monkeypatch.setattr(triton_segmented, "STASH_BYTES", 1)
    sizes, ours = [], triton_segmented.kernel.segmented_gradient

    def launch(*arguments):
        sizes.append(tuple(arguments[8].shape))
        ours(*arguments)

    monkeypatch.setattr(triton_segmented.kernel, "segmented_gradient", launch)
    layer = draw(generator, [5, 1, 6], [2, 1], 17, 33, BF16)
    assert_matches(layer, device)
    tile = gradient_tile(device, BF16)
    assert sizes == [(1, 2, tile.rows * tile.columns)]


@pytest.mark.parametrize("prompts", [[], [0, 0]], ids=["no prompt", "empty prompts"])
def test_no_responses(prompts, device, generator):
    gram, dot, gradient = draw(generator, [], prompts).run(device)
    assert gram.shape == (0, 0)
    assert dot.shape == (0,)
    assert (gradient == 1).all()


def test_offsets_beyond_32_bits(device):
    """A row that begins 2^31 elements behind the first; most of the memory between is never touched."""
    stride = 2**30 + 512
    storage = torch.empty(2 * stride + 16, dtype=FP16, device=device)
    b = storage.as_strided((3, 16), (stride, 1))
    b[2] = torch.arange(16, device=device)
    a = torch.ones(3, 4, dtype=FP16, device=device)
    rows = torch.tensor([2, 3], device=device)
    gram, _ = segmented_gradient(b, a, rows[:1], rows[1:], torch.tensor([0, 1], device=device), n_max=1)
    assert gram.item() == 4 * sum(i * i for i in range(16))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("n", [3, 20, 64])
def test_full_tiles(n, dtype, generator):
    """Several tiles of a GPU, the last ones cut off; up to three steps of tokens."""
    lengths = torch.randint(0, 180, (n + 4,), generator=generator).tolist()
    assert_matches(draw(generator, lengths, [2, n, 2], 300, 264, dtype), torch.device("cuda"))


@pytest.mark.gpu
def test_the_host_does_not_wait(generator):
    device = torch.device("cuda")
    layer = draw(generator, [5, 70, 3], [2, 1], 40, 24, BF16)
    b, a, direction = (x.to(device) for x in (layer.b, layer.a, layer.direction))
    starts, stops = torch.tensor(layer.spans, device=device).T.contiguous()
    options = {"n_max": 2, "direction": direction, "gradient": torch.zeros_like(direction)}
    arguments = (b, a, starts, stops, torch.tensor([0, 2, 3], dtype=torch.int32, device=device))
    segmented_gradient(*arguments, **options)  # compiling waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        segmented_gradient(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_uses", [1, 2])
@pytest.mark.parametrize("direction", [True, False], ids=["direction", "no direction"])
def test_rows_as_a_layer_has_them(n_uses, direction, device, generator):
    """Responses of two prompts in turns, one of them empty in one use; the same from the products in torch."""
    groups, spans = [(0, 2, 3), (1,)], [[(0, 6), (6, 6), (6, 9), (9, 20)], [(3, 7), (7, 12), (12, 12), (0, 3)]]
    uses = [(*(torch.randn(20, width, generator=generator).to(device, BF16) for width in (18, 35)), own)
            for own in spans[:n_uses]]
    towards = torch.randn(18, 35, generator=generator).to(device) if direction else None
    ours, theirs = torch.zeros(2, 18, 35, device=device)
    grams, dots = prompt_products(uses, groups, direction=towards, gradient=ours)
    wide = [(b.float(), a.float(), own) for b, a, own in uses]
    pieces = [[[(b[slice(*own[i])], a[slice(*own[i])]) for b, a, own in wide] for i in group] for group in groups]
    expected_grams, expected_dots = segmented_gram(pieces, (18, 35), towards, theirs)
    for found, expected in zip(grams, expected_grams, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * expected.max().item())
    for found, expected in zip(dots, expected_dots, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_who_is_supported():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def rows(width, dtype=BF16, strides=None, device="cuda"):
        return torch.empty_strided((4, width), strides or (width, 1), dtype=dtype, device=device)

    with FakeTensorMode():  # no GPU is needed for the question
        assert supported(rows(6), rows(8), 64)
        assert supported(rows(6, FP16), rows(8, FP16), 1)
        assert supported(rows(6, strides=(9, 1)), rows(1, strides=(1, 7)), 8)
        assert not supported(rows(6), rows(8), 65)
        assert not supported(rows(6, torch.float32), rows(8, torch.float32), 8)
        assert not supported(rows(6), rows(8, FP16), 8)
        assert not supported(rows(6, strides=(1, 4)), rows(8), 8)
        assert not supported(rows(6), rows(8, strides=(1, 4)), 8)
        assert not supported(rows(6, device="cpu"), rows(8, device="cpu"), 8)


def test_a_tile_says_what_it_stashes():
    assert GradientTile(128, 64, 32, 16, 1, 2, 4, 3).stash_bytes == 4 * 128 * 64
