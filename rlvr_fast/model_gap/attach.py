"""Which parameters of a model can be tracked, and replacing (and restoring) the forwards of the modules that hold them.

Nothing of the model changes but the ``forward`` of instances: no hook on a module, no requires_grad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rlvr_fast import _validate as check
from rlvr_fast.model_gap.recording import Recording
from rlvr_fast.model_gap.segmented import accumulation_dtype
from rlvr_fast.model_gap.tap import EmbeddingSite, LinearSite, ScaleSite, Site, scale_slope
from rlvr_fast.model_gap.tensor_parallel.layers import TensorParallel, is_dtensor
from rlvr_fast.model_gap.transformers_sites import (
    ScaledEmbeddingSite,
    TransposedLinearSite,
    is_scaled_embedding,
    is_transposed_linear,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ABSENT = object()


class Replacement:
    """A bound stand-in for one module's forward that can be told from anyone else's."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.stand_in, self.previous = module, forward, module.__dict__.get("forward", _ABSENT)
        self.__wrapped__ = module.forward  # what inspect.signature looks at
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stand_in(*args, **kwargs)

    def undo(self) -> None:
        if self.previous is _ABSENT:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.previous


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of a DistributedDataParallel, which only averages what its layers' backward brings."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(model, DistributedDataParallel):
        return model
    if model.mixed_precision is not None:
        raise ValueError("model must be in a DistributedDataParallel without mixed_precision, which puts other tensors "
                         "in the place of its parameters: use torch.autocast")
    return model.module


def check_model(model: nn.Module) -> None:
    """Refuse models whose backward does not pass through plain eager modules, whole while they run, in this process."""
    for name, module in model.named_modules():
        where = f"model ({type(module).__name__}{f' at {name}' if name else ''})"
        if isinstance(module.__dict__.get("forward"), Replacement):
            raise RuntimeError(f"{where} is already inside a ModelGap: one at a time")
        if isinstance(module, nn.DataParallel):
            raise ValueError(f"{where} must not be in torch.nn.DataParallel, which copies it: pass model.module")
        if _is_a(module, "DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(f"{where} must not be wrapped by a distributed engine other than one "
                             "DistributedDataParallel around it, or fully_shard: gradients and shards of other "
                             "processes are not seen here")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} must not be compiled: run the measured step on the module torch.compile got")
        if any(is_dtensor(value) for value in vars(module).values()) or any(
                hasattr(parameter, "_st_info") for parameter in module._parameters.values()):
            raise ValueError(f"{where} must not be tensor-parallel in a DistributedDataParallel with a device_mesh, "
                             "whose first forward takes the parameters out of their modules: use fully_shard, or "
                             "average the gradients over the data-parallel ranks in the loop")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} must not be a TorchScript module")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id"):  # ZeRO
            raise ValueError(f"model must hold plain tensors, got {type(parameter).__name__} for {name} "
                             f"on {parameter.device}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")


def reshard(model: nn.Module) -> None:
    """Let modules under ``fully_shard`` have their sharded parameters, which a forward may have left gathered."""
    for module in model.modules():
        if _is_a(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]  # an FSDPModule, known by its name


def gathered(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that ``fully_shard`` gathers for their layers."""
    return tuple(f"{path}." if path else "" for path, module in model.named_modules() if _is_a(module, "FSDPModule"))


def _is_a(module: nn.Module, *names: str) -> bool:
    """By name, so that no distributed engine is imported for the question."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def find_sites(recording: Recording, model: nn.Module, names: dict[int, str], lm_head: nn.Module | None,
               spread: TensorParallel | None = None) -> tuple[list[Site], dict[str, str]]:
    """The sites of all recognised modules, and why each remaining trainable parameter is not covered.

    A parameter shared by modules of both kinds has a site and a reason: its sites see a part of its gradient only.

    ``names`` maps id(parameter) to its name, for the trainable ones.
    """
    sites: list[Site] = []
    reasons: dict[str, str] = {}
    affine: dict[tuple[Any, ...], bool] = {}
    for path, module in model.named_modules():
        own = {key: names[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in names}
        if not own and module is not lm_head:
            continue
        kind, reason = _recognise(module, affine)
        if kind is None:
            reasons.update({name: f"{type(module).__name__}: {reason}" for name in own.values()})
            continue
        sites.append(kind(recording, module, path, own, spread))
    return sites, reasons


def _recognise(module: nn.Module, affine: dict[tuple[Any, ...], bool]) -> tuple[type[Site] | None, str]:
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return None, "its forward was replaced by someone else"
    if torch.nn.utils.parametrize.is_parametrized(module) or module._parameters.keys() - {"weight", "bias"}:
        return None, "it has parameters besides weight and bias, or computes these from others"
    if isinstance(module, nn.Linear):
        if type(module).forward is nn.Linear.forward:
            return LinearSite, ""
        return None, "a Linear with a forward of its own"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return None, "max_norm, scale_grad_by_freq or sparse gradients"
        if type(module).forward is nn.Embedding.forward:
            return EmbeddingSite, ""
        if is_scaled_embedding(module):
            return ScaledEmbeddingSite, ""
        return None, "an Embedding with a forward of its own"
    if is_transposed_linear(module):
        return TransposedLinearSite, ""
    if not module._modules and not module._buffers and _is_scale(module, affine):
        return ScaleSite, ""
    return None, "not a linear layer, an embedding or an elementwise scale"


def _is_scale(module: nn.Module, known: dict[tuple[Any, ...], bool]) -> bool:
    """Whether the output is affine in a [d] weight (and bias), element by element; tried out on a random input."""
    own = module._parameters
    weight = own.get("weight")
    if weight is None or weight.ndim != 1 or any(p is not None and p.shape != weight.shape for p in own.values()):
        return False
    key = (type(module), tuple(weight.shape), weight.dtype, weight.device, own.get("bias") is not None)
    if key not in known:
        known[key] = _behaves_as_scale(module, weight, own.get("bias"))
    return known[key]


def _behaves_as_scale(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    x, trial = draw(2, 3, len(weight)), {"weight": draw(len(weight))}
    if bias is not None:
        trial["bias"] = draw(len(weight))
    parameters: dict[str, Any] = module._parameters  # plain tensors will do
    before = dict(parameters)
    try:
        with torch.no_grad():
            for name in trial:  # whole, where the weight is a shard
                parameters[name] = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            still, slope = module.forward(x), scale_slope(module, module.forward, x)
            parameters.update(trial)
            output = module.forward(x)
            expected = still + slope * trial["weight"] + (trial["bias"] if bias is not None else 0.0)
            rounding = 4 * torch.finfo(output.dtype).eps * (1 + expected.abs().max())
            return output.shape == x.shape and bool(((output - expected).abs() <= 4 * rounding).all())
    except Exception:  # an unknown module may raise anything on an input it was not made for
        return False
    finally:
        parameters.update(before)


def replicated(gradient: DTensor) -> DTensor:
    """The same DTensor with its partial sums added up."""
    if not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate  # imported already, since a DTensor came
    return gradient.redistribute(placements=[Replicate() if placement.is_partial() else placement
                                             for placement in gradient.placements])


def gradient_norm_sq(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per parameter the squared norm of its gradient, float64 scalars; of a shard times the number of shards.

    So the mean over the ranks is that of the whole gradient, whether each has all of it or a shard. Partial sums are
    added up over their ranks first, which is collective.
    """
    norms = {}
    for name, gradient in gradients.items():
        shards = 1
        if is_dtensor(gradient):
            gradient = replicated(gradient)
            shards = math.prod(size for size, placement in zip(gradient.device_mesh.shape, gradient.placements,
                                                               strict=True) if not placement.is_replicate())
            gradient = gradient.to_local()
        norm = torch.linalg.vector_norm(gradient, dtype=accumulation_dtype(gradient.dtype))
        norms[name] = shards * norm.double().square()
    return norms


def find_lm_head(model: nn.Module, given: nn.Module | None) -> nn.Module | None:
    """The module that makes the logits: as given, as the model says, or by its name; None if there is no telling."""
    if given is not None:
        if not isinstance(given, nn.Module) or all(module is not given for module in model.modules()):
            raise ValueError(f"lm_head must be a module of the model, got {type(given).__name__}")
        return given
    ask = getattr(model, "get_output_embeddings", None)
    found: Any = ask() if callable(ask) else None
    if found is None:
        found = next((module for path, module in model.named_modules()
                      if path.split(".")[-1] == "lm_head" and isinstance(module, nn.Linear)), None)
    saved = getattr(found, "modules_to_save", None)  # PEFT's wrapper around a head that is trained whole
    if isinstance(saved, nn.ModuleDict):
        found = saved[found.active_adapters[0]] if found.active_adapters else found.original_module
    return found if isinstance(found, nn.Linear) else None


def check_direction(direction: Mapping[Any, torch.Tensor] | None, parameters: dict[str, nn.Parameter],
                    shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Directions by parameter name; ``shapes`` are those of whole parameters."""
    if direction is None:
        return {}
    if not isinstance(direction, dict) or not direction:
        raise TypeError(f"direction must be a dict from parameters (or names) to tensors, got {type(direction)}")
    names = {id(p): name for name, p in parameters.items()}
    result = {}
    for key, value in direction.items():
        name = names.get(id(key)) if isinstance(key, torch.Tensor) else key
        if name not in parameters:
            raise ValueError(f"direction must name trainable parameters of the model, got {check.describe(key)}")
        if isinstance(value, torch.Tensor) and is_dtensor(value):
            raise TypeError(f"direction[{name}] must be a plain tensor of the whole shape, got a DTensor: pass its "
                            "full_tensor()")
        check.tensor(f"direction[{name}]", value, shape=shapes[name], device=parameters[name].device)
        result[name] = value.detach()
    return result
