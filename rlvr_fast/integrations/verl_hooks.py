"""Where the metrics enter verl: its registry of policy losses, and two functions that its drivers call by name.

Each hook stands alone. One that cannot be placed, and a measurement that fails, is a warning with verl's version in it,
once; training goes on without those metrics.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from rlvr_fast.integrations.verl_update import KEY, SUMS, combine, update_sums

logger = logging.getLogger(__name__)
PREFIX = "rlvr:"  # of the measured policy losses' names
STOCK = "rlvr_fast_stock"  # what a wrapper of ours wraps
TESTED = "0.9.1"
Result = TypeVar("Result")
Function = Callable[..., Any]
NOTHING: dict[str, float] = {}


def warn(what: str, error: Exception) -> None:
    """Say in the log what there will not be, why, and in which release."""
    version = getattr(sys.modules.get("verl"), "__version__", "(unknown)")
    logger.warning("rlvr_fast: no %s, training goes on without: %s: %s (verl %s; tested with %s; "
                   "VERL_USE_EXTERNAL_PLUGINS=none keeps the plug-in out)", what, type(error).__name__, error, version,
                   TESTED)


def attempt(measure: Callable[..., Result], instead: Result, what: str) -> Callable[..., Result]:
    """``measure``, but what it raises is a warning, the first time, and ``instead`` is returned: a monitor must not end
    a run."""
    failed: list[Exception] = []

    @functools.wraps(measure)
    def tried(*args: Any, **kwargs: Any) -> Result:
        try:
            return measure(*args, **kwargs)
        except Exception as error:
            if not failed:
                warn(what, error)
            failed.append(error)
            return instead

    return tried


def replace(module: ModuleType, name: str, wrap: Callable[[Function], Function]) -> None:
    """Have ``wrap(stock)`` called in place of verl's function; doing it again replaces the wrapper.

    Raises:
        AttributeError: if there is no such function.
    """
    function = getattr(module, name)
    stock = getattr(function, STOCK, function)
    wrapped = functools.wraps(stock)(wrap(stock))
    setattr(wrapped, STOCK, stock)
    # Trainers that were imported before hold the function by name.
    for path, other in list(sys.modules.items()):
        own = getattr(other, "__dict__", {}).get(name) if path.startswith("verl.") else None
        if own is not None and getattr(own, STOCK, own) is stock:
            setattr(other, name, wrapped)


def measured(name: str, core_algos: ModuleType) -> Callable[..., tuple[torch.Tensor, dict[str, Any]]]:
    """What is registered as ``name`` when it is called, its value untouched, and the update's sums in its metrics."""
    nothing = dict.fromkeys((KEY + s for s in SUMS), 0.0)  # verl wants the same keys of every micro-batch and rank

    @functools.partial(attempt, instead=nothing, what=f"metrics of the update by loss {name!r}")
    def sums(stock: Function, loss: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        return update_sums(loss, given["old_log_prob"], given["log_prob"], given["advantages"], given["response_mask"])

    def policy_loss(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        stock = core_algos.POLICY_LOSS_REGISTRY[name]
        loss, metrics = stock(*args, **kwargs)
        return loss, {**metrics, **sums(stock, loss, args, kwargs)}

    return functools.update_wrapper(policy_loss, core_algos.POLICY_LOSS_REGISTRY[name])


def register_losses(core_algos: ModuleType) -> None:
    """Every policy loss of verl's registry also as "rlvr:<name>"; those that come later when they are asked for."""
    def register(name: str) -> None:
        core_algos.register_policy_loss(PREFIX + name)(measured(name, core_algos))

    for name in [name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith(PREFIX)]:
        register(name)

    def with_later_ones(stock: Function) -> Function:
        def get_policy_loss_fn(name: str) -> Function:
            own = name.removeprefix(PREFIX)
            if own != name and name not in core_algos.POLICY_LOSS_REGISTRY and own in core_algos.POLICY_LOSS_REGISTRY:
                register(own)
            return stock(name)

        return get_policy_loss_fn

    replace(core_algos, "get_policy_loss_fn", with_later_ones)


def divide_in_reduce_metrics(metric: ModuleType) -> None:
    """Where the driver averages the actor's metrics, have the figures come out in place of their sums."""
    divided = attempt(combine, NOTHING, "metrics of the update in the driver's log")

    def with_figures(stock: Function) -> Function:
        def reduce_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
            reduced = stock(metrics)
            sums = {key: reduced.pop(key) for key in list(reduced) if KEY in key}
            reduced.update(divided(sums))
            return reduced

        return reduce_metrics

    replace(metric, "reduce_metrics", with_figures)


def add_to_data_metrics(metric_utils: ModuleType, measure: Callable[[Any], dict[str, float]]) -> None:
    """Have ``measure(batch)`` in what verl's driver logs of its batch."""
    found = attempt(measure, NOTHING, "gradient-gap metrics in the driver's log")

    def with_gap_metrics(stock: Function) -> Function:
        def compute_data_metrics(batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return stock(batch, *args, **kwargs) | found(batch)

        return compute_data_metrics

    replace(metric_utils, "compute_data_metrics", with_gap_metrics)
