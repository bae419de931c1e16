"""Final hidden states and lm_head of a transformers causal language model while a trainer runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class NotMeasurable(Exception):
    """Why a model's final hidden states or head cannot be used."""


def base_model(model: Any) -> Any:
    """The model itself, or the one that a PEFT model adapts."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class HiddenStates:
    """Hands the backbone's output to ``see`` at every forward, detached. The model computes what it did before.

    Args:
        model: a causal language model, or a PEFT model around one, before a trainer wraps it.
        temperature: that the trainer divides logits by.
        see: called with the final hidden states, [B, T, D].

    Raises:
        NotMeasurable: if backbone or head are not found, or the head is more than Linear, softcap and scale.
    """

    def __init__(self, model: torch.nn.Module, temperature: float, see: Callable[[torch.Tensor], None]) -> None:
        self._model = base_model(model)
        config = self._model.config
        if config.get_text_config() is not config:
            raise NotMeasurable("the model is no plain causal language model")
        backbone = getattr(self._model, "base_model", self._model)
        if backbone is self._model or not isinstance(self._model.get_output_embeddings(), torch.nn.Linear):
            raise NotMeasurable("the model has no backbone under a linear lm_head")
        self._softcap = getattr(config, "final_logit_softcapping", None)
        scale = next((value for name in MULTIPLIERS if (value := getattr(config, name, None)) is not None), 1.0)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            scale = divisor if config.model_type == "hyperclovax" else scale / divisor
        if scale != 1.0 and self._softcap is not None:
            raise NotMeasurable("logits are scaled before a softcap")
        self._temperature = temperature / scale
        backbone.register_forward_hook(lambda module, args, output: see(output.last_hidden_state.detach()))

    def head(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """(hidden, weight, other arguments) for ``gradient_gap``, in the dtype that the forward used."""
        lm_head = self._model.get_output_embeddings()
        weight, bias = lm_head.weight.detach(), None if lm_head.bias is None else lm_head.bias.detach()
        if isinstance(weight, DTensor):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if weight.numel() == 0:
            raise NotMeasurable("lm_head is sharded (ZeRO-3)")
        return hidden.to(weight.device), weight.to(hidden.dtype), {
            "bias": None if bias is None else bias.to(hidden.dtype), "temperature": self._temperature,
            "softcap": self._softcap}
