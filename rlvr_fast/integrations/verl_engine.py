"""verl's FSDP engine with Σp² beside fused kernels, which verl itself refuses.

verl has Σp² (``actor.calculate_sum_pi_squared``: its optimal token baseline and variance proxies) only from whole
logits, and raises NotImplementedError with ``model.use_fused_kernels``, which never make them. Its registry takes
another engine for a vendor of one's own. Two variables of the environment, on every node, select this one; all other
engines, and everything else in this one, stay verl's:

    VERL_USE_EXTERNAL_MODULES=rlvr_fast.integrations.verl_engine VERL_ENGINE_VENDOR=rlvr_fast

Log-probs and entropies remain those of verl's kernel. Σp² is a head pass of its own over the micro-batch
(``rlvr_fast.token_stats``), made where it is asked for and the weights are gathered: inside the model's forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rlvr_fast.token_stats import token_stats

VENDOR = "rlvr_fast"
SUM_P_SQ = "calculate_sum_pi_squared"


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "npu"], vendor=VENDOR)
class FusedTokenStatsEngine(FSDPEngineWithLMHead):
    """``FSDPEngineWithLMHead`` whose fused models can tell Σp² as well."""

    _temperature: float | None = None  # of the micro-batch, while its Σp² is wanted
    _sum_p_sq: torch.Tensor

    def _build_module(self) -> Any:
        module: Any = super()._build_module()
        if self.model_config.use_fused_kernels:
            hidden: list[torch.Tensor] = []
            base = getattr(module, module.base_model_prefix)
            base.register_forward_hook(lambda _, args, output: hidden.append(output[0]) if self._temperature else None)
            module.forward = functools.wraps(module.forward)(
                functools.partial(self._forward, module, module.forward, hidden))
        return module

    def _forward(self, module: Any, stock: Any, hidden: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if self._temperature:
            last, weight = hidden[-1], module.lm_head.weight
            rows = last.flatten(0, 1).to(weight.dtype)
            nothing = torch.zeros(len(rows), dtype=torch.long, device=rows.device)  # Σp² is of no particular token
            found = token_stats(rows.detach(), weight.detach(), nothing, temperature=self._temperature)
            self._sum_p_sq = found.sum_p_sq.view(last.shape[:2])
        hidden.clear()
        return output

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        self._temperature = float(micro_batch["temperature"]) if _wanted(micro_batch) else None
        return super().prepare_model_inputs(micro_batch)

    def prepare_model_outputs(self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict,
                              logits_processor_func: Any) -> dict[str, torch.Tensor]:
        if not _wanted(micro_batch):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        without = micro_batch.copy()
        tensordict_utils.assign_non_tensor(without, **{SUM_P_SQ: False})
        found = super().prepare_model_outputs(output, output_args, without, logits_processor_func)
        values = self._sum_p_sq
        del self._sum_p_sq
        self._temperature = None
        offsets = micro_batch["input_ids"].offsets()
        if tensordict_utils.get_non_tensor_data(micro_batch, "use_remove_padding", True):
            values = self._gather_and_unpad_packed(values.squeeze(0), output_args["pad_size"])
        else:
            values = values[torch.arange(values.shape[1], device=values.device) < offsets.diff()[:, None]]
        return found | {"sum_pi_squared": torch.nested.nested_tensor_from_jagged(values, offsets)}


def _wanted(micro_batch: TensorDict) -> bool:
    """Whether this is what verl refuses."""
    return all(tensordict_utils.get_non_tensor_data(micro_batch, key, False) for key in (SUM_P_SQ, "use_fused_kernels"))
