"""Tiny random models of transformers: their norms, grouped heads, tied heads, packing and checkpointing."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from test_model_gap import advantages_of, policy_loss

import rlvr_fast as rf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"vocab_size": zoo.VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}
CONFIGURATIONS = {"Qwen2": {"tie_word_embeddings": True}, "Llama": {"tie_word_embeddings": False},
                  "Qwen3": {"tie_word_embeddings": True, "head_dim": 8},
                  "Gemma2": {"head_dim": 8, "final_logit_softcapping": None, "attn_logit_softcapping": None}}


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **CONFIGURATIONS[family], initializer_range=0.3,
                                                      attn_implementation="eager")
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def oracle(model, batch):
    """As ``model_zoo.oracle``."""
    double = copy.deepcopy(model).double()
    double.gradient_checkpointing_disable()
    rows = {name: [] for name, p in double.named_parameters() if p.requires_grad}
    for i, n in enumerate(batch.lengths):
        ids = batch.ids[i:i + 1, :n]
        double.zero_grad()
        logp = zoo.token_logp(double(input_ids=ids).logits, ids)[batch.mask[i:i + 1, :n]]
        logp.mean().backward()
        for name, p in double.named_parameters():
            if p.requires_grad:
                rows[name].append(torch.zeros(p.numel()).double() if p.grad is None else p.grad.reshape(-1))
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_matches(gap, gradients, batch):
    """1e-4: rotary positions are float32 in the oracle too, and attention scores here are large."""
    exact = torch.cat([gradients[name] for name in gap.coverage.tracked], 1)
    for p, members in enumerate(batch.rollouts.members):
        rows = exact[list(members)]
        assert (gap.gram[p] - rows @ rows.T).abs().max() <= 1e-4 * (rows @ rows.T).max()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_padded(family, checkpointing, generator):
    batch, model = zoo.sample(generator), build(family)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    attention = (torch.arange(batch.ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]).long()
    advantages = advantages_of(batch, generator)
    forwards = [module.forward for module in model.modules()]
    with rf.ModelGap(model, batch.rollouts) as probe:
        logits = model(input_ids=batch.ids, attention_mask=attention, use_cache=False).logits
        policy_loss(zoo.token_logp(logits, batch.ids), batch.mask, advantages).backward()
    assert [module.forward for module in model.modules()] == forwards
    gap = probe.gap()
    assert gap.coefficients.tolist() == pytest.approx((-advantages / 7).tolist(), rel=1e-3)
    assert not gap.coverage.missing  # Gemma2's embedding, which scales what it looks up, among the tracked
    assert_matches(gap, oracle(model, batch), batch)


@pytest.mark.parametrize("method", ["segmented", "sketch"])
def test_packed(method, generator):
    batch, model = zoo.sample(generator), build("Qwen2")
    ids, positions, mask = batch.packed()
    advantages = advantages_of(batch, generator)
    weights = torch.repeat_interleave(advantages, torch.tensor(batch.lengths))[None]
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        (weights * zoo.token_logp(logits, ids) * mask).sum().backward()
    assert probe.coverage.missing == {}
    assert_matches(probe.gap(), oracle(model, batch), batch)


def test_left_padded_rows_one_at_a_time(generator):
    """A row of one response with left padding is not a packed row."""
    batch, model = zoo.sample(generator), build("Llama")
    width = batch.ids.shape[1]
    with rf.ModelGap(model, batch.rollouts, "sketch", sketch_size=64) as probe:
        for i, n in enumerate(batch.lengths):
            ids, mask = (torch.roll(x[i:i + 1], width - n, 1) for x in (batch.ids, batch.mask))
            attention = (torch.arange(width)[None] >= width - n).long()
            positions = (attention.cumsum(1) - 1).masked_fill(attention == 0, 1)
            logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits
            (zoo.token_logp(logits, ids) * mask).sum().backward()
    assert_matches(probe.gap(), oracle(model, batch), batch)


def test_last_positions_only(generator):
    batch, model = zoo.sample(generator), build("Llama")
    width, keep = batch.ids.shape[1], batch.ids.shape[1] - 1
    with rf.ModelGap(model, batch.rollouts) as probe:
        logits = model(input_ids=batch.ids, logits_to_keep=keep, use_cache=False).logits
        assert logits.shape[1] == keep
        logp = torch.log_softmax(logits, -1)[:, :-1].gather(2, batch.ids[:, width - keep + 1:, None]).squeeze(2)
        (logp * batch.mask[:, width - keep + 1:]).sum().backward()
    assert_matches(probe.gap(), oracle(model, batch), batch)
