"""Ways to per-response gradient norms beside a training step. All leave the step's gradient in ``param.grad``.

Each takes a ``Step`` and returns ‖∇ log π(o_i)‖² of every response, [R] float64, the part of the answer that all have
in common; ``gives`` says what else a provider has by then.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import functional_call, grad, vmap

import rlvr_fast as rf

from .step import Step, response_logp

GRAM = "all inner products inside each prompt"
GAP = f"{GRAM}, gap norms with error bars"


@dataclass(frozen=True)
class Provider:
    """One way.

    Attributes:
        missing: Step -> why it does not run there, or None.
        rounds: at most so many, for the slow ones.
        profiled: whether it is asked which operators its time goes to.
    """

    name: str
    run: Callable[[Step], torch.Tensor | None]
    gives: str
    missing: Callable[[Step], str | None] = lambda step: None
    rounds: int | None = None
    profiled: bool = False


def plain(step: Step) -> None:
    step.backward()


def model_gap(method: str, step: Step) -> torch.Tensor:
    with rf.ModelGap(step.model, step.rollouts, method, length_norm=False) as probe:
        if method == "exact":
            logp = response_logp(step.model, step.ids, step.shape.prompt_tokens)
            probe.backward(logp, torch.ones_like(logp))
            (-(step.coefficients[:, None] * logp).sum()).backward()
        else:
            step.backward()
    return torch.cat([gram.diagonal() for gram in probe.gap().gram])


def loop(step: Step) -> torch.Tensor:
    """A forward and a backward per response; the gradients of one prompt are kept for their inner products."""
    names, parameters = zip(*step.model.named_parameters(), strict=True)
    norms = []
    for members in step.rollouts.members:
        own = []
        for i in members:
            logp = response_logp(step.model, step.ids[i:i + 1], step.shape.prompt_tokens)
            own.append(torch.autograd.grad(logp.sum(), parameters))
        stacked = {name: torch.stack([gradients[k] for gradients in own]) for k, name in enumerate(names)}
        norms.append(_reduce(step, stacked, members))
    return torch.cat(norms)


def per_sample(step: Step) -> torch.Tensor:
    """torch.func: vmap over the responses of a prompt of the gradient of one."""
    parameters = {name: p.detach() for name, p in step.model.named_parameters()}

    def total(values, ids):
        call = partial(functional_call, step.model, values)
        return response_logp(call, ids, step.shape.prompt_tokens).sum()

    def of_prompt(members):
        return vmap(grad(total), in_dims=(None, 0))(parameters, step.ids[list(members)])

    return torch.cat([_reduce(step, of_prompt(members), members) for members in step.rollouts.members])


def _reduce(step: Step, gradients: dict[str, torch.Tensor], members: tuple[int, ...]) -> torch.Tensor:
    """Diagonal of the prompt's Gram of ``gradients`` {name: [n, ...]}, which also go into the loss's gradient."""
    gram = torch.zeros(len(members), len(members), dtype=torch.float64)
    coefficients = -step.coefficients[list(members)]
    for name, parameter in step.model.named_parameters():
        flat = gradients[name].flatten(1)
        gram += (flat @ flat.T).double()
        share = (coefficients @ flat).view_as(parameter)
        parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)
    return gram.diagonal()


def opacus_ghost(step: Step) -> torch.Tensor:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(step.model, loss_reduction="sum", use_ghost_clipping=True)
    try:
        logp = response_logp(wrapped, step.ids, step.shape.prompt_tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hook on a first layer, whose input needs no gradient
            (-(step.coefficients[:, None] * logp).sum()).backward()
        return wrapped.get_norm_sample().double().square() / step.coefficients.double().square()
    finally:
        wrapped.to_standard_module()


def _exact_missing(step: Step) -> str | None:
    if step.shape.n_layers * len(step.ids) > 200:
        return f"a reference: {len(step.ids)} backward passes through the whole batch would take minutes here"
    return None


def _opacus_missing(step: Step) -> str | None:
    if step.shape.tied:
        return "ghost norms refuse tied weights"
    return None if importlib.util.find_spec("opacus") else "opacus is not installed"


PROVIDERS = (
    Provider("plain step", plain, "nothing but the step", profiled=True),
    Provider("rlvr_fast segmented", partial(model_gap, "segmented"), GAP, profiled=True),
    Provider("rlvr_fast ghost", partial(model_gap, "ghost"), GAP, profiled=True),
    Provider("rlvr_fast sketch", partial(model_gap, "sketch"), "a sketch of every gradient, gap norms with error bars",
             profiled=True),
    Provider("rlvr_fast exact", partial(model_gap, "exact"), GAP, _exact_missing, rounds=1),
    Provider("opacus ghost norms", opacus_ghost, "norms only", _opacus_missing),
    Provider("torch.func vmap(grad)", per_sample, f"every gradient of a prompt at once, {GRAM}", rounds=2),
    Provider("loop over responses", loop, f"every gradient of a prompt at once, {GRAM}", rounds=3),
)
