"""Score sums taken through the lm_head: fp32 accuracy whatever the dtype of the weight."""

from __future__ import annotations

import pytest
import torch

from rlvr_fast.backends import torch_backend, triton_backend
from rlvr_fast.backends.triton_blocks import split_terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp32 products and sums of 3 · 4099 terms, relative to the sum of the magnitudes.
TOLERANCE = 1e-6


def sums_of(kind: str) -> torch.Tensor:
    """[7, 4099] float32; row 0 is that of an empty response."""
    generator = torch.Generator().manual_seed(3)
    sums = torch.randn(7, 4099, generator=generator)
    if kind == "wide":  # what a peaked softmax leaves: a few entries near 1, the rest down to 1e-12
        sums *= 10.0 ** (-12 * torch.rand(7, 4099, generator=generator))
    elif kind == "tiny":
        sums *= 1e-25
    elif kind == "huge":  # unnormalised responses of thousands of tokens
        sums *= 1e6
    elif kind == "single":  # nothing averages out: two terms of bf16 would miss the tolerance
        sums[:, 1:] = 0.0
    sums[0] = 0.0
    return sums


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["normal", "wide", "tiny", "huge", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_product_keeps_fp32_accuracy(backend, dtype, kind):
    sums, weight = sums_of(kind), torch.randn(4099, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    product = backend.through_head(sums, weight)
    truth, magnitude = sums.double() @ weight.double(), sums.double().abs() @ weight.double().abs()
    assert product.dtype == torch.float32
    assert ((product.double() - truth).abs() <= TOLERANCE * magnitude).all()


@pytest.mark.parametrize("kind", ["normal", "wide", "huge"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_terms_add_up(dtype, kind):
    """bf16: 3 · 8 bits of each entry. fp16: 3 · 11 bits, or what is left above 2^-24 when the row begins at 2^15."""
    sums = sums_of(kind)
    terms, scale = split_terms(sums, dtype)
    assert terms.dtype == dtype
    whole = (terms.double().sum(0) * scale.double()[:, None]) - sums.double()
    floor = 2.0**-39 * sums.double().abs().amax(1, keepdim=True) if dtype == torch.float16 else 0.0
    assert (whole.abs() <= 2.0**-23 * sums.double().abs() + floor).all()
