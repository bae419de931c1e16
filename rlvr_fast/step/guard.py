"""An optimizer that knows where its steps stop helping: it warns of them, shortens them, or takes them back.

Two measurements, both on rollouts that had no part in the step:

* where the last step *ended* (``observe``), from the fresh rollouts with which every iteration begins: two forward
  passes give the break-even of such steps, as a learning rate (``StepMeter``). "scale" keeps the next steps at a
  fraction of it.
* what this step *did* (``check_with``), from held-out rollouts of the policy before it and one forward pass after it.
  "backtrack" shortens a step that lost, or that went where these rollouts do not reach.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.directional_scores import DirectionalScores, directional_scores
from rlvr_fast.step.meter import StepMeter
from rlvr_fast.step.reading import StepReading
from rlvr_fast.step.statistics import log_ratios

MODES = ("warn", "scale", "backtrack")
SHORTEST, LONGEST = 0.2, 1.5  # one measurement changes the allowed learning rate by no more than these factors


class StepWarning(UserWarning):
    """The step that is about to be taken is longer than its measured break-even."""


class StepGuard(torch.optim.Optimizer):
    """Wraps an optimizer; everything an optimizer has (groups, state, hooks) is the wrapped one's::

        guard = rf.StepGuard(torch.optim.AdamW(model.parameters(), lr=1e-6), mode="scale")
        for ...:
            rollouts = ...                                  # fresh, sampled from the policy as it is now
            guard.observe(logp_fn, rollouts)                # where did the last step end?
            loss(rollouts).backward()
            guard.step()                                    # never beyond ``fraction`` of its break-even
            logger.log(guard.metrics())

    Learning-rate schedulers may be built on either optimizer: the guard shortens a step by the learning rate it shows
    the wrapped optimizer *during* ``step`` and puts the scheduled one back, so that schedulers never see it. That
    shortens the step exactly for optimizers whose step is a multiple of the learning rate (SGD, Adam and AdamW with
    their weight decay, most others). With momentum the direction is the past's, which a shorter step does not turn:
    in a loop with Adam "scale" helped little where "backtrack" did. GradScaler: give ``scaler.unscale_`` and
    ``scaler.step`` the guard. Steps that a scaler skips are not measured.

    Memory: from a step that is to be measured until ``observe``, Δθ, one number per parameter; with "backtrack" also
    one copy of the parameters while ``step`` checks. Time: two forward passes per ``observe``, three if the loop does
    not give its log-probs; one and one more per shortening for a check.

    Args:
        optimizer: any that takes its step from ``param_groups[...]["lr"]``.
        mode: "warn": a ``StepWarning`` before a step longer than its measured break-even, and metrics; the steps are
            those of the optimizer. "scale": steps are kept at ``fraction`` of the break-even, as far as it is known,
            begin carefully (``start``), and do not grow where too few responses of a class tell. "backtrack": that
            too, and a step given to ``check_with`` whose held-out gain is significantly negative is shortened to
            ``fraction`` of itself until it is not, four times at most, then undone. One beyond the reach of the
            held-out rollouts (effective share below 10 %) counts as lost: a collapse looks like that.
        fraction: of the break-even, in (0, 1); 0.5 is the peak of a parabola.
        start: the first step's share of its learning rate in "scale" and "backtrack", in (0, 1]: no later measurement
            helps where the first step collapses, and with Adam it is the longest of all (a sign step; of 12 collapses
            in a sweep 6 came with it). From there on steps grow by at most 1.5 times each; 1: no such care.
        every: measure every that many steps.
        share: of the wall time that may go into measuring, in (0, 1]; the guard times itself and spaces measurements
            out. None: no limit. Clocks of ranks differ, so it must be None with a meter that reduces.
        meter: the StepMeter to use; by default one with smoothing 0.5. With several ranks give one with ``reduce``:
            every rank must observe and check alike, and then decides alike.
    """

    _step_supports_amp_scaling = False  # a scaler would hand its scale to the guard, where the optimizer cannot see it

    def __init__(self, optimizer: torch.optim.Optimizer, mode: str = "warn", *, fraction: float = 0.5,
                 start: float = 0.2, every: int = 1, share: float | None = 0.1, meter: StepMeter | None = None) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {check.describe(optimizer)}")
        if not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(f"optimizer must have a learning rate in every group, {type(optimizer).__name__} has not")
        self.mode, self.fraction = check.choice("mode", mode, MODES), check.positive("fraction", fraction)
        if self.fraction >= 1:
            raise ValueError(f"fraction must be below 1, got {fraction:g}")
        self.start = check.positive("start", start)
        if self.start > 1:
            raise ValueError(f"start must be at most 1, got {start:g}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an int >= 1, got {check.describe(every)}")
        if share is not None and not check.positive("share", share) <= 1:
            raise ValueError(f"share must be at most 1, got {share:g}")
        if meter is not None and not isinstance(meter, StepMeter):
            raise TypeError(f"meter must be a StepMeter, got {check.describe(meter)}")
        if meter is not None and meter.reduce is not None and share is not None:
            raise ValueError("share must be None with a meter that reduces: ranks would measure at different steps")
        self.inner, self.every, self.share = optimizer, every, share
        self.meter = StepMeter(smoothing=0.5) if meter is None else meter
        self.break_even_rate = self.allowed_rate = math.inf
        self.scale, self.n_steps, self.n_measured, self.n_backtracks, self.n_undone = 1.0, 0, 0, 0, 0
        self._update: dict[torch.Tensor, torch.Tensor] | None = None
        self._length = 0.0
        self._check: tuple[Callable[[], torch.Tensor], Rollouts, torch.Tensor] | None = None
        self._reading: StepReading | None = None
        self._began, self._cost, self._total_cost, self._next = time.perf_counter(), 0.0, 0.0, 0.0

    # -- measuring ----------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether ``observe`` would measure now: the last step was recorded, as schedule and time share allow."""
        return self._update is not None

    def observe(self, logp_fn: Callable[[], torch.Tensor], rollouts: Rollouts, *,
                logp: torch.Tensor | None = None) -> StepReading | None:
        """Measure where the last step ended; nothing if it is not due. Before the gradients of these rollouts.

        The parameters move while ``logp_fn`` runs and come back bit for bit, also when it raises; nothing is measured
        then and the guard is as it was. Autograd sees them written to: record the loss's graph afterwards.

        Args:
            logp_fn: the log-probs of the rollouts' tokens under the parameters as they are; without dropout.
            rollouts: fresh, sampled after the last step.
            logp: what ``logp_fn`` would return now, if the loop has it: saves one forward pass.
        """
        if self._update is None:
            return None
        began = time.perf_counter()
        scores = directional_scores(logp_fn, self._update.keys(), self._update, rollouts, logp=logp)
        self.meter.end(rollouts, scores, length=self._length)
        self._reading, self._update = self.meter.reading(), None
        self._learn(self._reading)
        self.n_measured += 1
        self._spent(began)
        return self._reading

    def _learn(self, reading: StepReading) -> None:
        """Break-even and allowed learning rate from a reading in multiples of a step of rate ``_length``."""
        sure = math.isfinite(reading.break_even_high) or reading.verdict == "overshoot"
        if sure and 0 < reading.break_even < math.inf:
            self.break_even_rate = reading.break_even * self._length
            allowed = self.fraction * reading.break_even
        else:  # lost, and nobody knows by how much: shorten; nothing in sight: grow, unless nothing could be seen
            blind = reading.reason in ("no contrast", "scarce class", "sample gone")
            allowed = {"overshoot": self.fraction, "near": 1.0}.get(reading.verdict, 1.0 if blind else LONGEST)
            self.break_even_rate = self._length if reading.verdict == "overshoot" else math.inf
        if reading.verdict == "safe":
            allowed = max(allowed, 1.0)
        self.allowed_rate = min(max(allowed, SHORTEST), LONGEST) * self._length

    @torch.no_grad()
    def check_with(self, logp_fn: Callable[[], torch.Tensor], rollouts: Rollouts, *,
                   logp: torch.Tensor | None = None) -> None:
        """Held-out rollouts for the next ``step`` of mode "backtrack": of the policy as it is, no part of its gradient.

        Args:
            logp_fn: the log-probs of the rollouts' tokens under the parameters as they are; called again in ``step``.
            rollouts: those rollouts.
            logp: what it would return now, if the loop has it.
        """
        if self.mode != "backtrack":
            raise ValueError(f"check_with needs mode 'backtrack', the guard has mode {self.mode!r}")
        if not callable(logp_fn):
            raise TypeError(f"logp_fn must be callable, got {check.describe(logp_fn)}")
        began = time.perf_counter()
        logp = check.tensor("logp_fn()", logp_fn() if logp is None else logp).detach().clone()
        log_ratios(logp, logp, None, rollouts, "torch")  # refuses bad arguments before any step is taken
        self._check = (logp_fn, rollouts, logp)
        self._total_cost += time.perf_counter() - began

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The wrapped optimizer's step, at the learning rate that the guard allows.

        If a check's ``logp_fn`` raises, the step stands at the length it had then, as a step of the optimizer at that
        learning rate: parameters and state agree, the scheduled learning rate is back, and nothing is half done. An
        error of the optimizer passes through with the scheduled learning rate back.
        """
        rate = float(self.inner.param_groups[0]["lr"])
        self._warn(rate)
        if self.n_measured == 0 and rate > 0:
            self.allowed_rate = self.start * rate if self.allowed_rate == math.inf else LONGEST * self.allowed_rate
        self.scale = 1.0 if self.mode == "warn" or rate <= 0 else min(1.0, self.allowed_rate / rate)
        check_now, self._check, self._update = self._check, None, None
        measured = rate > 0 and self._planned()
        movable = [p for group in self.inner.param_groups for p in group["params"] if p.requires_grad]
        before = {p: p.clone() for p in movable} if measured or check_now else {}
        with torch.enable_grad():
            result = self._shortened_step(closure)
        self.n_steps += 1
        if check_now:
            began = time.perf_counter()
            try:
                self._backtrack(before, *check_now)
            finally:
                self._spent(began)
        if measured and self.scale > 0:
            self._update = {p: torch.sub(p, start, out=start) for p, start in before.items()}
            self._length = rate * self.scale
        return result

    def _shortened_step(self, closure: Callable[[], Any] | None) -> Any:
        rates = [group["lr"] for group in self.inner.param_groups]
        try:
            if self.scale < 1:
                for group in self.inner.param_groups:
                    group["lr"] = group["lr"] * self.scale
            return self.inner.step() if closure is None else self.inner.step(closure)
        finally:
            for group, rate in zip(self.inner.param_groups, rates, strict=True):
                group["lr"] = rate

    def _backtrack(self, before: dict[torch.Tensor, torch.Tensor], logp_fn: Callable[[], torch.Tensor],
                   rollouts: Rollouts, logp: torch.Tensor) -> None:
        for _ in range(4):
            after = check.tensor("logp_fn()", logp_fn())
            change = log_ratios(logp, after, None, rollouts, "auto")[:, 0]
            if not self._lost(rollouts, change):
                return
            self.n_backtracks += 1
            self.scale *= self.fraction
            for parameter, start in before.items():
                parameter.copy_(torch.lerp(start, parameter, self.fraction))
        self.n_undone += 1
        self.scale = 0.0
        for parameter, start in before.items():
            parameter.copy_(start)

    def _lost(self, rollouts: Rollouts, change: torch.Tensor) -> bool:
        gain, stderr, reached = self.meter.gain(rollouts, DirectionalScores(behind=change))
        return not reached or gain < -self.meter.z * stderr

    def _warn(self, rate: float) -> None:
        if self.mode == "warn" and rate > self.break_even_rate:
            warnings.warn(f"learning rate {rate:.3g} is {rate / self.break_even_rate:.2g} times the one at which the "
                          f"step breaks even ({self.break_even_rate:.3g}, as measured at the end of step "
                          f"{self.n_steps}): success is likely to fall", StepWarning, stacklevel=3)

    def _planned(self) -> bool:
        on_schedule = self.n_steps % self.every == 0
        return on_schedule and (self.share is None or time.perf_counter() >= self._next)

    def _spent(self, began: float) -> None:
        now = time.perf_counter()
        self._cost = now - began
        self._total_cost += self._cost
        if self.share is not None:
            self._next = now + self._cost * (1 / self.share - 1)

    # -- reports ------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Flat floats for a logger: what the guard did, and the last reading; inf where no break-even is in sight."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        own = {"scale": self.scale, "break_even_rate": self.break_even_rate, "allowed_rate": self.allowed_rate,
               "measured": float(self.n_measured), "backtracks": float(self.n_backtracks),
               "undone": float(self.n_undone), "cost_share": self._total_cost / elapsed}
        reading = {} if self._reading is None else self._reading.summary()
        return {f"rlvr/step/guard/{name}": value for name, value in own.items()} | reading

    def __repr__(self) -> str:
        return (f"StepGuard(mode={self.mode}, steps={self.n_steps}, measured={self.n_measured}, "
                f"scale={self.scale:.3g}, break-even at lr {self.break_even_rate:.3g})\n{self.inner!r}")

    # -- the wrapped optimizer ----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What the guard does not have is the optimizer's, its hooks among it."""
        if name == "inner":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.inner, name)

    if not TYPE_CHECKING:  # a type checker takes them from the base class
        param_groups = property(lambda self: self.inner.param_groups,
                                lambda self, groups: setattr(self.inner, "param_groups", groups))
        state = property(lambda self: self.inner.state, lambda self, state: setattr(self.inner, "state", state))
        defaults = property(lambda self: self.inner.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the guard's own under "step_guard"."""
        own = {name: getattr(self, name) for name in ("break_even_rate", "allowed_rate", "scale", "n_steps",
                                                      "n_measured", "n_backtracks", "n_undone")}
        return self.inner.state_dict() | {"step_guard": own | {"meter": self.meter.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A ``state_dict``, or a plain one of the optimizer, with which the guard starts anew on its own part."""
        self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != "step_guard"})
        self._update = self._check = self._reading = None
        if "step_guard" in state_dict:
            own = dict(state_dict["step_guard"])
            device = self.inner.param_groups[0]["params"][0].device
            self.meter.load_state_dict(own.pop("meter"), device=device)
            vars(self).update(own)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
