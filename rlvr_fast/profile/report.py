"""What a profile found: per stage and scale, as figures, as tables and as JSON."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from rlvr_fast.profile.shape import AXIS_MEANING, Shape

STEP_FLOPS = {"with recompute": 8, "without recompute": 6}  # per parameter and token


@dataclass(frozen=True)
class StageResult:
    """One stage at the measured shape. Seconds: median, least, most, first call; ``requested_*`` at the asked shape.

    ``flops`` and ``bytes`` are what the result requires, not what was done; ``peak_extra_bytes`` is None where it
    cannot be measured.
    """

    name: str
    seconds: float
    least_seconds: float
    most_seconds: float
    first_seconds: float
    flops: float
    bytes: float
    requested_flops: float
    requested_bytes: float
    peak_extra_bytes: int | None

    def requested_seconds(self) -> float:
        """At the asked shape: the measured time in proportion to the work."""
        work, asked = (self.flops, self.requested_flops) if self.flops else (self.bytes, self.requested_bytes)
        return self.seconds * asked / work


@dataclass(frozen=True)
class Growth:
    """A stage at half of an axis and in full: medians, and the median of the ratios within a round."""

    axis: str
    name: str
    half_seconds: float
    full_seconds: float
    ratio: float


@dataclass(frozen=True, repr=False)
class ProfileReport:
    """Stages at ``measured``, which is ``requested`` unless a time budget asked for less.

    Attributes:
        gemm_flops_per_second: of one bare product of the same operands, in the same run.
        copy_bytes_per_second: read and written by a copy that fits no cache, in the same run.
        parameters: of the model, or None.
        seconds_budget, seconds_taken: of the whole profile.
    """

    requested: Shape
    measured: Shape
    stages: tuple[StageResult, ...]
    growth: tuple[Growth, ...]
    gemm_flops_per_second: float
    copy_bytes_per_second: float
    parameters: int | None
    softcap: float | None
    device_name: str
    device: str
    dtype: str
    backend: str
    repeats: int
    seconds_budget: float | None
    seconds_taken: float

    @property
    def scaled(self) -> bool:
        return self.measured != self.requested

    def floor(self, stage: StageResult) -> tuple[float, str]:
        """(seconds, which binds) of the required FLOPs at the product's rate, or of the bytes at the copy's."""
        limits = {"FLOPs": stage.flops / self.gemm_flops_per_second, "bytes": stage.bytes / self.copy_bytes_per_second}
        binding = max(limits, key=limits.__getitem__)
        return limits[binding], binding

    def step_seconds(self, factor: int) -> float | None:
        """Least time of a training step on the requested tokens, factor·parameters·N FLOPs at the product's rate."""
        if self.parameters is None:
            return None
        return factor * self.parameters * self.requested.n_tokens / self.gemm_flops_per_second

    def _steps(self) -> dict[str, float | None]:
        """``step_seconds`` of each kind of step."""
        return {name: self.step_seconds(factor) for name, factor in STEP_FLOPS.items()}

    def to_json(self) -> dict[str, Any]:
        stages = []
        for stage in self.stages:
            floor, binding = self.floor(stage)
            projected = stage.requested_seconds()
            shares = {name: None if step is None else projected / step for name, step in self._steps().items()}
            stages.append(asdict(stage) | {
                "flops_per_second": stage.flops / stage.seconds, "floor_seconds": floor, "bound_by": binding,
                "share_of_gemm": stage.flops / stage.seconds / self.gemm_flops_per_second if stage.flops else None,
                "share_of_floor": floor / stage.seconds, "requested_seconds": projected,
                "requested_seconds_is": "projected" if self.scaled else "measured", "share_of_step_at_most": shares})
        own = {key: value for key, value in vars(self).items() if key not in ("stages", "growth")}
        return own | {
            "requested": asdict(self.requested) | {"n_tokens": self.requested.n_tokens},
            "measured": asdict(self.measured) | {"n_tokens": self.measured.n_tokens}, "scaled": self.scaled,
            "stages": stages, "growth": [asdict(row) for row in self.growth],
            "step_flops": {name: f"{factor} x parameters x tokens" for name, factor in STEP_FLOPS.items()}}

    def render(self) -> Group:
        """For a rich console of 80 columns or more."""
        return Group(*self._head(), self._stage_table(), "", self._growth_table(), *self._axis_notes(), "",
                     *self._projection())

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self.render())
        return text.getvalue().rstrip()

    def _head(self) -> list[str]:
        lines = [f"{escape(self.device_name)}; {self.dtype}, backend {self.backend}; medians of {self.repeats}; "
                 f"{self.seconds_taken:.0f} s in all",
                 f"asked for:  {self.requested}"]
        if self.scaled:
            lines += [f"measured:   {self.measured}",
                      f"[bold]Scaled down by {self.requested.product_flops / self.measured.product_flops:,.0f}x to fit "
                      f"{self.seconds_budget:.0f} s: all measured figures are of the smaller shape,[/bold]",
                      "where fixed costs and those per response weigh more: projections from it err on the high side."]
        return [*lines, f"bare product {_rate(self.gemm_flops_per_second)}FLOP/s, copy "
                        f"{_rate(self.copy_bytes_per_second)}B/s (read + written), measured in this run", ""]

    def _stage_table(self) -> Table:
        table = Table(title="Stages, measured", title_justify="left", box=None, pad_edge=False)
        for column in ("stage", "ms", "first", "TFLOP/s", "of GEMM", "of floor, by", "memory"):
            table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=column == "stage")
        for stage in self.stages:
            floor, binding = self.floor(stage)
            rate, memory = stage.flops / stage.seconds, stage.peak_extra_bytes
            rates = (f"{rate / 1e12:.3g}", _percent(rate / self.gemm_flops_per_second)) if rate else ("", "")
            table.add_row(stage.name, _ms(stage.seconds), _ms(stage.first_seconds), *rates,
                          f"{_percent(floor / stage.seconds)} {binding}",
                          "" if memory is None else f"{memory / 2**20:,.1f} MiB")
        table.caption = ("ms: median; first: the first call, with compilation and loading. TFLOP/s of the operations "
                         "required. GEMM: the bare product. Floor: the slower of required FLOPs at its rate and "
                         "required bytes at the copy's; above 100 % where a backend's own product is faster than "
                         "torch's. Memory: the most held beyond the inputs, results included.")
        table.caption_justify = "left"
        return table

    def _growth_table(self) -> Table:
        axes = list(dict.fromkeys(row.axis for row in self.growth))
        table = Table(title="Time when one axis doubles to the measured shape, the others as they are",
                      title_justify="left", box=None, pad_edge=False)
        table.add_column("stage", no_wrap=True)
        for axis in axes:
            table.add_column(f"{axis} x 2", justify="right")
        ratios = {(row.name, row.axis): row.ratio for row in self.growth}
        for stage in self.stages:
            table.add_row(stage.name, *(f"x {ratios[stage.name, axis]:.2f}" for axis in axes))
        return table

    def _axis_notes(self) -> list[str]:
        measured = {row.axis for row in self.growth}
        return [f"  {axis}: {meaning}" + ("" if axis in measured else "; not measured: an odd size cannot be halved")
                for axis, meaning in AXIS_MEANING.items()]

    def _projection(self) -> list[str | Table]:
        kind = "Projected from the smaller shape" if self.scaled else "Measured"
        how = ", in proportion to the work each stage requires" if self.scaled else ""
        if self.parameters is None:
            return ["Share of a training step: give --parameters, or a --model."]
        table = Table(title=f"{kind}, at the shape asked for{how}", title_justify="left", box=None, pad_edge=False)
        for column in ("stage", "seconds", *(f"of a step {name}" for name in STEP_FLOPS)):
            table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=column == "stage")
        for stage in self.stages:
            seconds = stage.requested_seconds()
            table.add_row(stage.name, f"{seconds:.3g}", *(
                f"<= {_percent(max(seconds / step, 1e-4))}" for step in self._steps().values() if step is not None))
        steps = ", ".join(f"{factor}·parameters·N FLOPs {name} = {self.step_seconds(factor):,.3g} s"
                          for name, factor in STEP_FLOPS.items())
        return [table, f"  A step: {steps}, for {self.parameters / 1e9:.3g}B parameters, at the bare product's rate "
                       "and without sampling: real steps take longer, so the shares are upper bounds. linear_logprob "
                       "replaces the step's own log-probs; the other stages come on top."]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _percent(share: float) -> str:
    if share < 1e-4:
        return "< 0.01 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{share:,.0%}".replace("%", " %")


def _rate(per_second: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if per_second >= size:
            return f"{per_second / size:.3g} {unit}"
    return f"{per_second / 1e6:.3g} M"
