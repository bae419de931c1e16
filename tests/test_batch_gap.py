"""The batch's norm from inner products: against its definition on vectors, and when one prompt is nearly everything."""

from __future__ import annotations

import pytest
import torch
from policies import within

from rlvr_fast.batch_gap import batch_norm_sq, vector_products


def by_definition(vectors, bias, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """θ of all prompts, and θ without each of them in turn."""

    def theta(kept):
        share = weights[kept] / weights[kept].sum()
        return (share @ vectors[kept]).square().sum() - (share.square() * bias[kept]).sum()

    everyone = torch.arange(len(weights))
    return theta(everyone), torch.stack([theta(everyone[everyone != p]) for p in everyone])


@pytest.mark.parametrize("largest", [1.0, 1e6, 1e12])
def test_norm_and_jackknife_follow_the_definition(largest, generator):
    """Relative 1e-9 also where the other prompts weigh 1e-12 together: 1e-16 / 1e-12 is what float64 leaves of them."""
    vectors = torch.randn(7, 300, generator=generator, dtype=torch.float64)
    bias = torch.rand(7, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    weights[2] *= largest
    theta, left = by_definition(vectors, bias, weights)
    actual, stderr = batch_norm_sq(vector_products(vectors), bias, weights)
    tolerance = max(1e-9, 1e-15 * largest)
    assert within(actual, theta, rtol=1e-9)
    assert within(stderr, ((left - left.mean()).square().sum() * 6 / 7).sqrt(), rtol=tolerance)


def test_products_add_over_shards_of_the_coordinates(generator):
    vectors = torch.randn(5, 20000, generator=generator)
    vectors[3] = torch.nan
    whole = vector_products(vectors)
    assert within(vector_products(vectors[:, :7]) + vector_products(vectors[:, 7:]), whole, rtol=1e-12, atol=1e-9)
    kept = torch.tensor([0, 1, 2, 4])
    exact = vectors[kept].double() @ vectors[kept].double().T
    assert within(whole[kept][:, kept], exact, rtol=1e-12, atol=1e-9)
    assert (whole[3] == 0).all()
    assert (whole[:, 3] == 0).all()
