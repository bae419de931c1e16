"""Suite of a linear layer: its weight gradient with the inner products of the responses' parts, exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from rlvr_fast import backends
from rlvr_fast.bench.workload import GROUP_SIZE, RESPONSES

from .exact import SAMPLE_ENTRIES, sample
from .floors import product_floor
from .suite import Provider, Result, Suite, Truth
from .torch_peers import product

KERNEL = "segmented_gradient"
# name -> (d_out, d_in)
LAYERS = {
    "qwen2.5-7b mlp": (18944, 3584),
    "qwen2.5-7b attention": (3584, 3584),
    "qwen2.5-7b keys": (512, 3584),  # fewer tiles than a GPU has multiprocessors
    "tiny": (24, 40),  # for the dry run: a few tiles of Triton's interpreter
}
LIBRARY = "library weight gradient"  # the plain training step's, which the cost is compared with


@dataclass(frozen=True, eq=False)
class Layer:
    """Gradients b [N, d_out] of a layer's output and its inputs a [N, d_in], response after response.

    ``bounds`` [R + 1] on the host; every GROUP_SIZE responses are one prompt's.
    """

    b: torch.Tensor
    a: torch.Tensor
    bounds: tuple[int, ...]
    starts: torch.Tensor
    stops: torch.Tensor
    cu_prompts: torch.Tensor

    @classmethod
    def draw(cls, d_out: int, d_in: int, n_responses: int, mean_length: int, index: int, device: torch.device,
             dtype: torch.dtype = torch.bfloat16) -> Layer:
        """Lengths from a half to one and a half of their mean, in random order."""
        generator = torch.Generator().manual_seed(300 + index)
        spread = torch.linspace(0.5, 1.5, n_responses, dtype=torch.float64)[torch.randperm(n_responses,
                                                                                           generator=generator)]
        bounds = tuple(accumulate((spread * mean_length).round().int().tolist(), initial=0))
        generator = torch.Generator(device).manual_seed(300 + index)
        b, a = (torch.randn(bounds[-1], width, generator=generator, device=device, dtype=dtype)
                for width in (d_out, d_in))
        ends = torch.tensor(bounds, device=device)
        cu_prompts = torch.arange(0, n_responses + 1, GROUP_SIZE, dtype=torch.int32, device=device)
        return cls(b, a, bounds, ends[:-1].contiguous(), ends[1:].contiguous(), cu_prompts)

    @property
    def flops(self) -> float:
        """Of the weight gradient; the inner products are what is to cost nothing."""
        return 2.0 * self.b.shape[1] * self.a.numel()

    def prompts(self) -> list[tuple[tuple[int, int], ...]]:
        """The spans of each prompt's responses."""
        spans = tuple(pairwise(self.bounds))
        return [spans[first:first + GROUP_SIZE] for first in range(0, len(spans), GROUP_SIZE)]


def exact(inputs: Layer) -> dict[str, Truth]:
    """The last prompt's Gram matrix and sampled rows of the weight gradient, in float64."""
    spans, device = inputs.prompts()[-1], inputs.b.device
    gram = torch.zeros(GROUP_SIZE, GROUP_SIZE, dtype=torch.float64, device=device)
    for b in inputs.b.split(512, dim=1):
        block = torch.stack([(b[start:stop].T.double() @ inputs.a[start:stop].double()).flatten()
                             for start, stop in spans])
        gram += block @ block.T
    last = torch.arange(len(inputs.starts) - GROUP_SIZE, len(inputs.starts), device=device)
    rows = sample(inputs.b.shape[1], SAMPLE_ENTRIES, device)
    weight = sum(b.T.double() @ a.double() for b, a in zip(inputs.b[:, rows].split(8192), inputs.a.split(8192),
                                                           strict=True))
    return {"gram": Truth(last, gram), "weight_grad": Truth(rows, weight)}


# -- providers ---------------------------------------------------------------------------------------------------------


def segmented(inputs: Layer) -> Result:
    from rlvr_fast.backends.triton_segmented import segmented_gradient  # triton may be missing

    gradient = torch.zeros(inputs.b.shape[1], inputs.a.shape[1], device=inputs.b.device)
    gram, _ = segmented_gradient(inputs.b, inputs.a, inputs.starts, inputs.stops, inputs.cu_prompts, n_max=GROUP_SIZE,
                                 gradient=gradient)
    return {"gram": gram, "weight_grad": gradient.to(inputs.b.dtype)}


def _library(inputs: Layer) -> Result:
    torch.mm(inputs.b.T, inputs.a)
    return {}


def _batched(inputs: Layer) -> Result:
    """One batched product per prompt, its responses padded with zeros, into the operands' dtype; their Gram matrix."""
    grams, total = [], 0.0
    for spans in inputs.prompts():
        b, a = (torch.nn.utils.rnn.pad_sequence([x[start:stop] for start, stop in spans], batch_first=True)
                for x in (inputs.b, inputs.a))
        gradients = torch.bmm(b.mT, a)
        flat = gradients.flatten(1)
        grams.append(product(flat, flat.T))
        total = total + gradients.sum(0, dtype=torch.float32)
    return {"gram": torch.cat(grams), "weight_grad": total.to(inputs.b.dtype)}


def _one_by_one(inputs: Layer) -> Result:
    """A float32 product per response; nothing rounded, nothing padded."""
    grams, total = [], 0.0
    for spans in inputs.prompts():
        gradients = torch.stack([product(inputs.b[start:stop].T, inputs.a[start:stop]) for start, stop in spans])
        flat = gradients.flatten(1)
        grams.append(flat @ flat.T)
        total = total + gradients.sum(0)
    return {"gram": torch.cat(grams), "weight_grad": total.to(inputs.b.dtype)}


def _token_pairs(inputs: Layer) -> Result:
    """The plain weight gradient; ⟨b_t, b_s⟩⟨a_t, a_s⟩ of all pairs of a prompt's tokens, summed by response."""
    grams = []
    for spans in inputs.prompts():
        first, last = spans[0][0], spans[-1][1]
        pairs = product(inputs.b[first:last], inputs.b[first:last].T)
        pairs *= product(inputs.a[first:last], inputs.a[first:last].T)
        lengths = torch.tensor([stop - start for start, stop in spans]).to(pairs.device, non_blocking=True)
        by_rows = torch.segment_reduce(pairs, "sum", lengths=lengths, axis=0)
        grams.append(torch.segment_reduce(by_rows.T.contiguous(), "sum", lengths=lengths, axis=0))
    return {"gram": torch.cat(grams), "weight_grad": inputs.b.T @ inputs.a}


def suite(device: torch.device) -> Suite:
    providers = (product_floor(device), Provider(LIBRARY, _library, "floor"),
                 Provider("rlvr_fast triton", segmented, "ours", backends.available(device)["triton"]),
                 Provider("torch bmm per prompt, Gram", _batched),
                 Provider("torch product per response, Gram", _one_by_one),
                 Provider("torch pairs of tokens", _token_pairs))
    return Suite(KERNEL, providers, exact, lambda inputs: inputs.flops, reference=LIBRARY)


# The most telling first. (layer, responses, mean length)
CASES = {"cuda": (("qwen2.5-7b mlp", RESPONSES, 2048), ("qwen2.5-7b mlp", RESPONSES, 512),
                  ("qwen2.5-7b attention", RESPONSES, 2048), ("qwen2.5-7b keys", RESPONSES, 2048)),
         "cpu": (("tiny", GROUP_SIZE, 5),)}


def inputs_of(case: tuple[str, int, int], n_sets: int, device: torch.device) -> Callable[[], list[Layer]]:
    layer, n_responses, length = case
    return lambda: [Layer.draw(*LAYERS[layer], n_responses, length, index, device) for index in range(n_sets)]


def shape_of(case: tuple[str, int, int]) -> str:
    """R x mean T x d_out x d_in."""
    layer, n_responses, length = case
    return "x".join(map(str, (n_responses, length, *LAYERS[layer])))
