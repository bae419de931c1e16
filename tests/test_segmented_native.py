"""The native segmented weight gradient against float64 products, on every instruction set this processor has.

Tolerances, relative to the largest: 1e-6 for float32 sums over at most 400 tokens (chains of 256); half-precision is
taken as it comes.
"""

from __future__ import annotations

import pytest
import torch

from rlvr_fast.model_gap import native, segmented
from rlvr_fast.model_gap.witness import Witness

pytestmark = pytest.mark.skipif(not native._fast(), reason="the native kernels are not built, or of 128 bits")


def instruction_sets() -> list[str]:
    names = []
    for name in ("avx512", "avx2", "baseline"):
        try:
            native._native.instruction_set(name)
        except ValueError:
            continue
        names.append(name)
    return names


def draw(shape, lengths, generator, dtype=torch.float32):
    """Pieces, two of which are uses of the layer by the first response; G_i as rows in float64."""
    def factor(rows, width):
        return torch.randn(rows, width + 3, generator=generator).to(dtype)[:, 1:width + 1]  # rows further apart

    responses = [[(factor(n, shape[0]), factor(n, shape[1])) for n in ((length, 2) if i == 0 else (length,))]
                 for i, length in enumerate(lengths)]
    rows = torch.stack([sum(b.double().T @ a.double() for b, a in own).reshape(-1) for own in responses])
    return responses, rows


def close(found, expected, tolerance):
    return (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "lengths"), [
    ((37, 70), [3, 0, 400, 5, 1]), ((5, 1), [2, 2]), ((1, 33), [1]), ((100, 40), [17] * 9), ((12, 32), [4, 0, 0, 3]),
    ((200, 600), [20, 30])])
@pytest.mark.parametrize("name", instruction_sets())
def test_inner_products_direction_and_gradient(name, shape, lengths, dtype, generator):
    responses, rows = draw(shape, lengths, generator, dtype)
    direction = torch.randn(shape, generator=generator)
    start = torch.randn(shape, generator=generator)
    gradient = start.clone()
    gram, dots = native.segmented_gram(responses, shape, direction, gradient, instruction_set=name)
    assert close(gram, rows @ rows.T, 1e-6)
    assert torch.equal(gram, gram.T)
    along = rows @ direction.double().reshape(-1)
    assert (dots - along).abs().max() <= 1e-6 * (rows.norm(dim=1) * direction.norm()).max()
    assert close(gradient.reshape(-1), start.double().reshape(-1) + rows.sum(0), 2e-6)
    bare, nothing = native.segmented_gram(responses, shape, instruction_set=name)
    assert nothing is None
    assert torch.equal(bare, gram)


def test_no_bit_depends_on_the_number_of_threads(generator):
    shape = (300, 1100)  # several items of work
    responses, _ = draw(shape, [33, 20, 50], generator)
    direction, found = torch.randn(shape, generator=generator), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            gradient = torch.zeros(shape)
            found.append((*native.segmented_gram(responses, shape, direction, gradient), gradient))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_factors_of_two_dtypes(generator):
    responses, _ = draw((20, 30), [6, 7], generator)
    mixed = [[(b.bfloat16(), a) for b, a in own] for own in responses]
    same = [[(b.bfloat16().float(), a) for b, a in own] for own in responses]
    assert torch.equal(native.segmented_gram(mixed, (20, 30))[0], native.segmented_gram(same, (20, 30))[0])


def test_torch_blocks_and_native_agree(generator, monkeypatch):
    shape = (50, 41)
    responses, rows = draw(shape, [5, 9, 2], generator)
    direction = torch.randn(shape, generator=generator)
    for serves in (native.serves, lambda *_: False):
        monkeypatch.setattr(native, "serves", serves)
        gradient = torch.zeros(shape)
        grams, dots = segmented.segmented_gram([responses], shape, direction, gradient)
        assert close(grams[0], rows @ rows.T, 1e-6)
        assert close(dots[0], rows @ direction.double().reshape(-1), 1e-5)
        assert close(gradient.reshape(-1), rows.sum(0), 2e-6)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float16, torch.bfloat16)])
def test_the_witness_sees_the_same_natively(dtypes, generator, monkeypatch):
    b, a = (torch.randn(31, d, generator=generator).to(dtype) for d, dtype in zip((20, 12), dtypes, strict=True))
    seen = []
    for serves in (native.serves, lambda *_: False):
        monkeypatch.setattr(native, "serves", serves)
        witness = Witness.__new__(Witness)
        witness.entries = {"w": (torch.tensor([0, 19, 3]), torch.tensor([11, 0, 5]))}
        witness.seen, witness.size = ({"w": torch.ones(3, dtype=torch.float64)} for _ in range(2))
        witness.outer("w", b, a)
        seen.append((witness.seen["w"], witness.size["w"]))
    for own, torchs in zip(*seen, strict=True):
        assert torch.allclose(own, torchs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(seen[0][0], seen[0][1])
