"""Adapters of the real PEFT on tiny random models of transformers, and what of transformers' own modules is covered."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from test_model_gap import advantages_of, policy_loss
from test_model_gap_transformers import SIZES, oracle

import rlvr_fast as rf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ["segmented", "ghost", "sketch", "exact"]
GPT2 = {"n_inner": 24, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Of PEFT's ways to adapt, those that leave every response a gradient of its own in plain linear layers.
ADAPTERS = {"lora": {}, "rslora": {"use_rslora": True}, "biases": {"bias": "lora_only"}}


def base(family: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """In float64, so that what differs from the oracle is the method's; rotary angles are float32 in both."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options, initializer_range=0.3,
                                                      attn_implementation="eager")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, family + head)(config).to(dtype).train()


def adapted(family: str, dtype: torch.dtype = torch.float64, targets=PROJECTIONS, sizes=None, **options
            ) -> torch.nn.Module:
    """With adapters that do something: B begins at 0, where A would have no gradient."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    model = peft.get_peft_model(base(family, dtype, **sizes or {}), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model) -> dict:
    """All that a ModelGap could leave behind in a model; gradients apart."""
    return {path: (type(module), dict(module.__dict__), getattr(module.forward, "__func__", module.forward),
                   [(name, id(p), p.requires_grad, p._version) for name, p in module._parameters.items()
                    if p is not None], list(module._forward_hooks), list(module._forward_pre_hooks),
                   list(module._backward_hooks))
            for path, module in model.named_modules()}


def measure(model, batch, method, *, probed=False, loss=policy_loss):
    advantages = torch.linspace(0.5, 2.0, len(batch.lengths), dtype=torch.float64)
    with rf.ModelGap(model, batch.rollouts, method, sketch_size=64) as probe:
        logp = zoo.token_logp(model(input_ids=batch.ids, use_cache=False).logits, batch.ids)
        if probed or method == "exact":
            probe.backward(logp, batch.mask)
        loss(logp, batch.mask, advantages).backward()
    return probe.gap()


def assert_matches(gap, gradients, batch, tolerance=1e-5) -> None:
    """Relative to the largest product of each prompt."""
    exact = torch.cat([gradients[name] for name in gap.coverage.tracked], 1)
    for gram, members in zip(gap.gram, batch.rollouts.members, strict=True):
        rows = exact[list(members)]
        assert (gram - rows @ rows.T).abs().max() <= tolerance * (rows @ rows.T).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_every_adapter_is_covered(family, adapter, method, generator):
    batch, model = zoo.sample(generator), adapted(family, **ADAPTERS[adapter])
    expected, before = oracle(model, batch), snapshot(model)
    gap = measure(model, batch, method)
    assert snapshot(model) == before
    assert set(gap.coverage.tracked) == trainable(model) == set(expected)
    assert gap.coverage.missing == {}
    assert gap.coverage.share == pytest.approx(1.0)
    assert all("lora_" in name or "bias" in name for name in gap.coverage.tracked)
    assert_matches(gap, expected, batch)


def test_gradients_are_those_of_a_step_without_it(generator):
    batch, model = zoo.sample(generator), adapted("Llama")
    measure(model, batch, "segmented")
    measured = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logp = zoo.token_logp(model(input_ids=batch.ids, use_cache=False).logits, batch.ids)
    policy_loss(logp, batch.mask, torch.linspace(0.5, 2.0, len(batch.lengths), dtype=torch.float64)).backward()
    assert measured.keys() == trainable(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(measured[name], p.grad, rtol=1e-10, atol=1e-12)
        else:
            assert p.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_in_float32(method, generator):
    """Against the float64 oracle, which rounds the rotary angles alike; attention scores here are large."""
    batch, model = zoo.sample(generator), adapted("Llama", torch.float32)
    assert_matches(measure(model, batch, method), oracle(model, batch), batch, tolerance=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_under_checkpointing(reentrant, generator):
    batch, model = zoo.sample(generator), adapted("Llama")
    expected = oracle(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before = snapshot(model)
    gap = measure(model, batch, "segmented")
    assert snapshot(model) == before
    assert set(gap.coverage.tracked) == trainable(model)
    assert_matches(gap, expected, batch)


def test_two_steps_in_a_row_and_a_switched_off_adapter(generator):
    """A reference pass inside the context, without gradients and without the adapter, is none of its forwards."""
    batch, model = zoo.sample(generator), adapted("Qwen2")
    for _ in range(2):
        expected = oracle(model, batch)
        with rf.ModelGap(model, batch.rollouts) as probe:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=batch.ids, use_cache=False)
            logp = zoo.token_logp(model(input_ids=batch.ids, use_cache=False).logits, batch.ids)
            policy_loss(logp, batch.mask, advantages_of(batch, generator).double()).backward()
        assert_matches(probe.gap(), expected, batch)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.01 * p.grad
        model.zero_grad()


def test_dora_is_named_where_it_is_not_covered(generator):
    """Its layers norm W + BA through calls of A and B whose rows are no tokens, and scale by a vector of its own."""
    batch, model = zoo.sample(generator), adapted("Llama", use_dora=True)
    expected = oracle(model, batch)
    with pytest.raises(RuntimeError, match="no parameter is covered") as told:
        measure(model, batch, "segmented")
    for name in trainable(model):
        assert name in str(told.value)
    gap = measure(model, batch, "exact")
    assert set(gap.coverage.tracked) == trainable(model)
    assert_matches(gap, expected, batch)


def test_dora_beside_lora(generator):
    """Only the adapters of one kind are missing, by name, and what is covered is right."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    batch = zoo.sample(generator)
    model = adapted("Llama", targets=["q_proj", "v_proj"])
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["down_proj"])
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    expected = oracle(model, batch)
    gap = measure(model, batch, "segmented")
    assert set(gap.coverage.tracked) | set(gap.coverage.missing) == trainable(model)
    assert {name.split(".")[-4] for name in gap.coverage.tracked} == {"q_proj", "v_proj"}
    assert all("down_proj" in name for name in gap.coverage.missing)
    assert 0 < gap.coverage.share < 1
    assert_matches(gap, expected, batch)


@pytest.mark.parametrize("probed", [False, True])
def test_a_fully_trained_head_beside_adapters(probed, generator):
    """PEFT keeps it in a wrapper; the head inside is found and covered like any other layer."""
    batch, model = zoo.sample(generator), adapted("Llama", modules_to_save=["lm_head"])
    expected = oracle(model, batch)
    gap = measure(model, batch, "segmented", probed=probed)
    assert any("modules_to_save" in name for name in gap.coverage.tracked)
    assert set(gap.coverage.tracked) == trainable(model)
    assert_matches(gap, expected, batch)


# -- transformers alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["segmented", "ghost", "sketch"])
def test_gemma2_scales_what_it_looks_up(method, generator):
    """And is covered with all the rest. In float32, as its norms are whatever the model is."""
    batch, options = zoo.sample(generator), {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    model = base("Gemma2", torch.float32, head_dim=8, **options)
    expected = oracle(model, batch)
    gap = measure(model, batch, method)
    assert gap.coverage.missing == {}
    assert set(gap.coverage.tracked) == trainable(model)
    assert_matches(gap, expected, batch, tolerance=1e-4)


@pytest.mark.parametrize("method", ["segmented", "ghost", "sketch"])
def test_gpt2_names_its_positions(method, generator):
    """They are looked up once for all responses. Its Conv1D is a linear layer with its weight turned round."""
    batch, model = zoo.sample(generator), base("GPT2", **GPT2)
    expected = oracle(model, batch)
    gap = measure(model, batch, method)
    (name, reason), = gap.coverage.missing.items()
    assert name == "transformer.wpe.weight"
    assert reason.startswith("Embedding")
    assert set(gap.coverage.tracked) == trainable(model) - {name}
    assert 0 < gap.coverage.share < 1
    assert_matches(gap, expected, batch)


def test_gpt2_with_adapters_on_its_conv1d(generator):
    """Adapters are linear layers whatever they adapt."""
    batch = zoo.sample(generator)
    model = adapted("GPT2", targets=["c_attn", "c_proj", "c_fc"], sizes=GPT2, fan_in_fan_out=True)
    expected = oracle(model, batch)
    gap = measure(model, batch, "segmented")
    assert set(gap.coverage.tracked) == trainable(model)
    assert gap.coverage.missing == {}
    assert_matches(gap, expected, batch)
