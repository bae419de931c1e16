"""Everything that cannot be measured is refused with a clear word, and the model is as it was."""

from __future__ import annotations

import contextlib

import model_zoo as zoo
import pytest
import torch
from test_model_gap import FEATURES, advantages_of, assert_exact, step
from torch import nn

import rlvr_fast as rf


def snapshot(model):
    """All that a probe could leave behind."""
    return {name: (dict(module.__dict__), list(module._forward_hooks), list(module._backward_hooks),
                   list(module._forward_pre_hooks), {k: id(p) for k, p in module._parameters.items()})
            for name, module in model.named_modules()} | {
                f"parameter {name}": (p.requires_grad, id(p.grad), dict(p._backward_hooks or {}))
                for name, p in model.named_parameters()}


@contextlib.contextmanager
def unchanged(model):
    before = snapshot(model)
    yield
    assert snapshot(model) == before


@pytest.fixture
def batch(generator):
    return zoo.sample(generator)


@pytest.mark.parametrize("method", ["segmented", "ghost", "sketch", "exact"])
@pytest.mark.parametrize("features", [FEATURES["tied"], FEATURES["lora"], FEATURES["layer norm"]])
def test_detaching_restores_everything(method, features, batch):
    model = zoo.build(**features)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.embed.forward = model.embed.forward  # someone's own, in the instance
    own = model.embed.__dict__["forward"]
    with unchanged(model):
        with rf.ModelGap(model, batch.rollouts, method) as probe:
            logp = zoo.token_logp(model(batch.ids), batch.ids)
            probe.backward(logp, batch.mask)
        assert all(not p.grad.any() for p in model.parameters())
        assert model.embed.__dict__["forward"] is own
        with pytest.raises(KeyError), rf.ModelGap(model, batch.rollouts, method):
            raise KeyError("the loop broke")


def test_forwards_that_others_replaced(batch):
    """A wrapper around the whole model stays; a layer whose forward is someone else's is not covered."""
    model, calls = zoo.build(), []
    whole, layer = model.forward, model.blocks[0].o.forward
    model.forward = lambda *args: calls.append(1) or whole(*args)
    model.blocks[0].o.forward = lambda x: 2 * layer(x)
    with unchanged(model), rf.ModelGap(model, batch.rollouts) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids)
        probe.backward(logp, batch.mask)
    assert calls == [1]
    assert probe.coverage.missing == {"blocks.0.o.weight": "Linear: its forward was replaced by someone else"}


def test_a_probe_that_failed_measures_nothing(batch):
    model = zoo.build()
    probe = rf.ModelGap(model, batch.rollouts)
    with contextlib.suppress(KeyError), probe:
        raise KeyError
    with pytest.raises(RuntimeError, match="ended in an error"):
        probe.gap()


@pytest.mark.parametrize(("arguments", "error", "match"), [
    ({"method": "fast"}, ValueError, "method must be one of segmented"),
    ({"length_norm": 1}, TypeError, "length_norm must be a bool"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ({"sketch_size": 1}, ValueError, "sketch_size must be"),
    ({"seed": 1.5}, TypeError, "seed must be"),
    ({"lm_head": nn.Linear(2, 2)}, ValueError, "lm_head must be a module of the model"),
    ({"direction": {"nothing": torch.ones(1)}}, ValueError, "direction must name"),
    ({"direction": {"lm_head.weight": torch.ones(1)}}, ValueError, r"direction\[lm_head.weight\] must have shape"),
    ({"direction": torch.ones(1)}, TypeError, "direction must be a dict"),
])
def test_arguments(arguments, error, match, batch):
    with pytest.raises(error, match=match):
        rf.ModelGap(zoo.build(), batch.rollouts, **arguments)


def test_model_and_rollouts(batch):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        rf.ModelGap(lambda x: x, batch.rollouts)
    with pytest.raises(TypeError, match=r"rollouts must be rlvr_fast.Rollouts, got Tensor"):
        rf.ModelGap(zoo.build(), batch.ids)
    with pytest.raises(ValueError, match="requires a gradient"):
        rf.ModelGap(zoo.build().requires_grad_(False), batch.rollouts)
    empty = rf.Rollouts.from_padded(batch.ids[:0], batch.mask[:0], torch.zeros(0), group_size=1)
    with pytest.raises(ValueError, match="at least one response"):
        rf.ModelGap(zoo.build(), empty)


def test_wrapped_models_are_refused(batch):
    model = zoo.build()
    compiled = torch.compile(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="must not be compiled"):
            rf.ModelGap(compiled, batch.rollouts)
        with pytest.raises(ValueError, match="DataParallel"):
            rf.ModelGap(nn.DataParallel(model), batch.rollouts)
    model.blocks[0].compile()
    with pytest.raises(ValueError, match=r"Block at blocks.0\) must not be compiled"):
        rf.ModelGap(model, batch.rollouts)
    spread = zoo.build()
    spread.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"plain tensors, got Parameter for lm_head\.weight on meta"):
        rf.ModelGap(spread, batch.rollouts)
    with pytest.raises(ValueError, match="plain tensors"):
        rf.ModelGap(zoo.build().to("meta"), batch.rollouts)


def test_entering_twice(batch):
    model = zoo.build()
    probe = rf.ModelGap(model, batch.rollouts)
    other = rf.ModelGap(model, batch.rollouts)
    with probe:
        with unchanged(model):
            with pytest.raises(RuntimeError, match="already inside a ModelGap"), other:
                pass
            with pytest.raises(RuntimeError, match="already inside a ModelGap"):
                rf.ModelGap(model, batch.rollouts)
            with pytest.raises(RuntimeError, match="make a new one"), probe:
                pass
        step(model, batch, torch.ones(8))
    with pytest.raises(RuntimeError, match="make a new one"), probe:
        pass
    assert_exact(probe.gap(), model, batch)


def test_asking_too_early_or_without_a_step(batch):
    model = zoo.build()
    probe = rf.ModelGap(model, batch.rollouts)
    with pytest.raises(RuntimeError, match="after the training step"):
        probe.gap()
    with pytest.raises(RuntimeError, match="inside the with block"):
        probe.backward(torch.ones(1))
    with probe:
        with pytest.raises(RuntimeError, match="after the with block"):
            probe.gap()
        with pytest.raises(RuntimeError, match="needs a forward"):
            probe.backward(torch.ones(1))
    with pytest.raises(RuntimeError, match="no forward of the model"):
        probe.gap()


def test_a_backward_that_never_came(batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch.rows(range(4)), torch.ones(4))
        model(batch.ids[4:])
    with pytest.raises(RuntimeError, match="a backward never came for 4 responses, response 4 the first"):
        probe.gap()
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch.rows(range(4)), torch.ones(4))
    with pytest.raises(RuntimeError, match="only 4 of 8 responses"):
        probe.gap()
    with rf.ModelGap(model, batch.rollouts, "exact") as probe:
        step(model, batch, torch.ones(8))
    with pytest.raises(RuntimeError, match=r"probe.backward\(logp\) never came for 8"):
        probe.gap()


def test_a_backward_after_the_context_counts_for_nothing(batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids)
    (logp * batch.mask).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="a backward never came"):
        probe.gap()
    model.zero_grad()
    (zoo.token_logp(model(batch.ids), batch.ids) * batch.mask).sum().backward()
    assert all(torch.allclose(ours[name], p.grad, rtol=1e-4, atol=1e-5) for name, p in model.named_parameters())


def test_a_second_backward_through_the_same_forward(batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids)
        (logp * batch.mask).sum().backward(retain_graph=True)
        (logp * batch.mask).sum().backward()
    with pytest.raises(RuntimeError, match="a second backward came through"):
        probe.gap()


def test_forwards_without_gradients_take_no_responses(batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        with torch.no_grad():
            model(batch.ids[:3])
        step(model, batch, torch.ones(8))
    assert_exact(probe.gap(), model, batch)


def test_rollouts_that_do_not_match_the_batch(batch, generator):
    model = zoo.build()
    with unchanged(model):
        with pytest.raises(ValueError, match=r"do not match the batch: .* response 0"), \
                rf.ModelGap(model, batch.rollouts):
            model(batch.ids.flip(0))
        with pytest.raises(ValueError, match="forwards hold 16 responses by now, rollouts has 8"), \
                rf.ModelGap(model, batch.rollouts):
            model(torch.cat([batch.ids, batch.ids]))
        with pytest.raises(ValueError, match="must be called with input_ids"), rf.ModelGap(model, batch.rollouts):
            model(batch.ids[0])


@pytest.mark.parametrize("method", ["segmented", "ghost"])
def test_a_split_prompt_is_named_before_anything_is_counted(method, batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts, method) as probe:
        with pytest.raises(ValueError, match="prompt 1 has some elsewhere: use method='sketch'"):
            model(batch.ids[:6])
        step(model, batch, torch.ones(8))
    assert_exact(probe.gap(), model, batch)


def test_packed_rows_that_share_a_prefix(batch):
    model = zoo.build()
    ids = batch.ids[:2].reshape(1, -1)
    positions = torch.arange(ids.shape[1])[None].clone()
    positions[0, 8:] -= 5
    with pytest.raises(ValueError, match=r"position_ids must count up from 0 .* share a prefix"), \
            rf.ModelGap(model, batch.rollouts, "sketch"):
        model(ids, position_ids=positions)
    ids, positions, _ = batch.packed()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask must keep packed sequences apart"), \
            rf.ModelGap(model, batch.rollouts, "sketch"):
        model(ids, position_ids=positions, attention_mask=mask)


@pytest.mark.parametrize(("arguments", "match"), [
    ({}, "give at least one of"),
    ({"responses": [0, 9]}, r"responses must be in \[0, 8\)"),
    ({"responses": [0, 1], "cu_seqlens": torch.tensor([0, 4])}, "one response per sequence, got 2 for 1"),
    ({"cu_seqlens": torch.tensor([0, 4, 2])}, "cu_seqlens must never decrease"),
    ({"responses": [1, 1]}, "response 1 comes again"),
])
def test_micro_batches(arguments, match, batch):
    with rf.ModelGap(zoo.build(), batch.rollouts, "sketch") as probe:
        with pytest.raises(ValueError, match=match), probe.micro_batch(**arguments):
            pass
        assert probe._recording.seen == []


@pytest.mark.parametrize(("logp", "mask", "match"), [
    (lambda logp, b: logp.detach(), lambda b: b.mask, "must have a graph"),
    (lambda logp, b: logp[:4], lambda b: b.mask[:4], r"must have shape \[8, T'\]"),
    (lambda logp, b: logp, lambda b: ~b.mask, "mask must be true on the"),
    (lambda logp, b: logp[:, :3].sum(1), lambda b: None, "logp must start with"),
])
def test_probe_backward(logp, mask, match, batch):
    model = zoo.build()
    with rf.ModelGap(model, batch.rollouts) as probe:
        own = zoo.token_logp(model(batch.ids), batch.ids)
        with pytest.raises(ValueError, match=match):
            probe.backward(logp(own, batch), mask(batch))
        probe.backward(batch.rollouts.pack(own))
        with pytest.raises(RuntimeError, match="measured already"):
            probe.backward(own, batch.mask)
    assert_exact(probe.gap(), model, batch)


def test_probe_backward_refuses_to_set_off_an_optimizer_in_the_backward(batch):
    model = zoo.build()
    hook = model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)
    with rf.ModelGap(model, batch.rollouts) as probe:
        logp = zoo.token_logp(model(batch.ids), batch.ids)
        with pytest.raises(ValueError, match=r"norm.weight has post-accumulate-grad hooks"):
            probe.backward(logp, batch.mask)
    hook.remove()


def test_reentrant_checkpointing_with_several_open_forwards(batch, generator):
    model = zoo.build(checkpointing="reentrant").train()
    with rf.ModelGap(model, batch.rollouts) as probe:
        parts = [batch.rows(range(4)), batch.rows(range(4, 8))]
        losses = [(zoo.token_logp(model(p.ids), p.ids) * p.mask).sum() for p in parts]
        sum(losses).backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        probe.gap()


# -- coverage ---------------------------------------------------------------------------------------------------------


class Oddities(nn.Module):
    """A model around one of the zoo's with parameters that cannot be tracked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.positions = inner, nn.Embedding(32, zoo.VOCABULARY)
        self.mixer = nn.Bilinear(zoo.VOCABULARY, 1, zoo.VOCABULARY)
        self.free = nn.Parameter(torch.ones(zoo.VOCABULARY))
        self.unused = nn.Linear(2, 2)
        self.normal = nn.utils.parametrizations.weight_norm(nn.Linear(zoo.VOCABULARY, zoo.VOCABULARY))
        self.gained = nn.Linear(zoo.VOCABULARY, zoo.VOCABULARY)
        self.gained.register_parameter("gain", nn.Parameter(torch.ones(1)))

    def forward(self, ids):
        logits = self.inner(ids)
        logits = logits + 0.1 * self.positions(torch.arange(ids.shape[1])[None]) * self.free
        logits = logits + 0.1 * self.gained.gain * self.gained(logits)
        return logits + 0.1 * self.normal(logits) + 0.1 * self.mixer(logits, torch.ones_like(logits[..., :1]))


def test_what_is_not_covered_is_named_with_its_share(batch, generator):
    model = Oddities(zoo.build())
    with rf.ModelGap(model, batch.rollouts) as probe:
        step(model, batch, advantages_of(batch, generator), probe=probe)
    missing = probe.coverage.missing
    assert "rows of its input [1, " in missing["positions.weight"]
    assert "not a linear layer" in missing["mixer.weight"]
    assert "besides weight and bias" in missing["gained.weight"]
    assert "Oddities" in missing["free"]
    assert missing["unused.weight"] == "no gradient came to it"
    odd = ("normal", "mixer", "gained")
    assert all(name in missing for name, _ in model.named_parameters() if name.startswith(odd))
    assert not any(name.startswith("inner.") for name in missing)
    norms = {name: p.grad.square().sum() for name, p in model.named_parameters() if p.grad is not None}
    inside = sum(value for name, value in norms.items() if name not in missing) / sum(norms.values())
    assert probe.coverage.share == pytest.approx(inside.item(), rel=1e-5)
    assert "positions.weight" in repr(probe.coverage)
    assert_exact(probe.gap(), model, batch)


def test_a_model_of_which_nothing_can_be_tracked(batch):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(zoo.VOCABULARY, zoo.VOCABULARY))

        def forward(self, ids):
            return self.table[ids]

    model = Strange()
    with pytest.raises(ValueError, match="no trainable parameter that can be tracked"), \
            rf.ModelGap(model, batch.rollouts):
        pass
    with rf.ModelGap(model, batch.rollouts, "exact") as probe:
        step(model, batch, torch.ones(8), probe=probe)
    assert_exact(probe.gap(), model, batch)
