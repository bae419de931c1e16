"""Layers of transformers that torch has no like of, against one float64 backward per response. Look-alikes suffice."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from test_model_gap import advantages_of, assert_exact, plain_gradients, step
from torch import nn

import rlvr_fast as rf


class Conv1D(nn.Module):
    """As GPT-2's: the weight is [d_in, d_out]."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.nf, self.nx = d_out, d_in
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * d_in**-0.5)
        self.bias = nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(size)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: a constant in a buffer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class SquaredEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) ** 2


class ShiftedConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x) + 1.0


ShiftedConv1D.__name__ = "Conv1D"


def build(tied: bool, embedding=ScaledEmbedding, linear=Conv1D) -> nn.Module:
    """The zoo's model, positions and all, with other layers in it."""
    model = zoo.build(tied=tied)
    torch.manual_seed(1)
    embedding = embedding(zoo.VOCABULARY, zoo.WIDTH)
    embedding.weight = model.embed.weight
    model.embed, model.blocks[0].mlp[0] = embedding, linear(2 * zoo.WIDTH, zoo.WIDTH)
    model.blocks[1].q, model.blocks[1].o = linear(zoo.WIDTH, zoo.WIDTH), linear(zoo.WIDTH, zoo.WIDTH)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["segmented", "ghost"])
def test_they_agree_with_a_loop_over_responses(method, tied, generator):
    batch, model = zoo.sample(generator), build(tied)
    advantages = advantages_of(batch, generator)
    expected = plain_gradients(model, lambda: step(model, batch, advantages))
    with rf.ModelGap(model, batch.rollouts, method) as probe:
        step(model, batch, advantages)
    gap = probe.gap()
    assert gap.coverage.missing == {}
    assert_exact(gap, model, batch)
    for name, parameter in model.named_parameters():
        if method == "ghost":
            assert torch.equal(parameter.grad, expected[name])
        else:  # the order of summation
            assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


def test_their_sketches_are_exact_where_nothing_is_folded(generator):
    """A sketch as wide as the layers keeps every entry, up to signs and places."""
    batch, model = zoo.sample(generator), build(True)
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=29) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert probe.gap().coverage.missing == {}
    assert_exact(probe.gap(), model, batch)


def test_direction_along_a_transposed_weight(generator):
    """Its shape is the parameter's: along the gradient of one response it gives that response's row of the Gram."""
    batch, model = zoo.sample(generator), build(False)
    name = "blocks.0.mlp.0.weight"
    along = zoo.oracle(model, batch)[name][0].float().view(zoo.WIDTH, 2 * zoo.WIDTH)
    with rf.ModelGap(model, batch.rollouts, direction={name: along}) as probe:
        step(model, batch, advantages_of(batch, generator))
    gradients = zoo.oracle(model, batch, True)[name] @ along.double().flatten()
    for p, members in enumerate(batch.rollouts.members):
        correct = batch.rollouts.correct[list(members)]
        expected = gradients[list(members)][correct].mean() - gradients[list(members)][~correct].mean()
        assert probe.gap().alignment[p] == pytest.approx(float(expected), rel=1e-4)


def test_what_only_looks_like_them_is_not_covered(generator):
    batch, model = zoo.sample(generator), build(False, SquaredEmbedding, ShiftedConv1D)
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert probe.coverage.missing["embed.weight"] == "SquaredEmbedding: an Embedding with a forward of its own"
    assert probe.coverage.missing["blocks.1.q.weight"].startswith("Conv1D: not a linear layer")


def test_gpt2s_own(generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=zoo.VOCABULARY, n_positions=32, n_embd=12, n_layer=2, n_head=2,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    gpt2, batch = transformers.GPT2LMHeadModel(config), zoo.sample(generator)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt2, self.lm_head = gpt2, gpt2.lm_head

        def forward(self, input_ids):
            return self.gpt2(input_ids=input_ids).logits

    model = Logits()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator))
    assert {name.split(".")[-2] for name in probe.coverage.missing} <= {"wpe"}
    assert_exact(probe.gap(), model, batch)
