"""The drawings of the concept pages. Curves are computed from the closed-form task and from ``rf.kappa``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

import rlvr_fast as rf
from site_tools import svg


def draw(name: str, description: str) -> str:
    """The drawing as an <svg> element.

    Raises:
        KeyError: for a name that there is none of.
    """
    return DRAWINGS[name](description)


def gap(description: str) -> str:
    """Response gradients of one prompt in a plane, their class means and the arrow between these: a sketch, seeded."""
    generator = torch.Generator().manual_seed(8)
    right = torch.randn(9, 2, generator=generator, dtype=torch.float64) * 38 + torch.tensor([440.0, 95.0])
    wrong = torch.randn(9, 2, generator=generator, dtype=torch.float64) * 38 + torch.tensor([160.0, 165.0])
    (x_right, y_right), (x_wrong, y_wrong) = right.mean(0).tolist(), wrong.mean(0).tolist()
    parts = [*(svg.dot((x, y), "good faint", 5) for x, y in right.tolist()),
             *(svg.dot((x, y), "bad faint", 5) for x, y in wrong.tolist()),
             svg.arrow((x_wrong, y_wrong), (x_right, y_right), "accent thick"),
             svg.dot((x_wrong, y_wrong), "bad", 7), svg.dot((x_right, y_right), "good", 7),
             svg.text((x_right + 14, y_right - 12), "g⁺", "label strong"),
             svg.text((x_wrong - 12, y_wrong - 8), "g⁻", "label strong", "end"),
             svg.text(((x_right + x_wrong) / 2 - 20, (y_right + y_wrong) / 2 - 40), "gradient gap g⁺ − g⁻",
                      "label strong", "middle"),
             svg.text((x_right, 22), "∇ log π of correct responses", "label good-ink", "middle"),
             svg.text((x_wrong, 252), "∇ log π of incorrect responses", "label bad-ink", "middle")]
    return svg.document(600, 262, parts, description)


def step(description: str) -> str:
    """Success along an update in the closed-form task (T = 64, |Σ| ≤ 6, θ = 0.12), with peak and break-even."""
    start = 0.12

    def success(multiple: float) -> float:  # of the break-even, which is 2θ away
        return _task_success(start - 2 * start * multiple, length=64, bound=6)

    multiples = [i / 100 for i in range(136)]
    values = [success(m) for m in multiples]
    low, high = 0.18, max(values) + 0.06

    def at(m: float, value: float) -> tuple[float, float]:
        return 40 + 400 * m, 230 - 190 * (value - low) / (high - low)

    begin, peak = success(0.0), success(0.5)
    ends = [(0.0, 0.5, "safe", "safe"), (0.5, 1.0, "near", "near"), (1.0, 1.35, "overshoot", "overshoot")]
    parts = [svg.box(at(left, high), (400 * (right - left), 190), f"zone {style}") for left, right, style, _ in ends]
    parts += [svg.text((at((left + right) / 2, high)[0], 34), label, f"label {style}-ink", "middle")
              for left, right, style, label in ends]
    parts += [svg.line(at(0, low), at(1.35, low)), svg.line(at(0, low), at(0, high)),
              svg.line(at(0, begin), at(1.35, begin), "axis dashed"),
              svg.path([at(m, value) for m, value in zip(multiples, values, strict=True)], "accent thick"),
              svg.line(at(0.5, low), at(0.5, peak), "axis dashed"), svg.line(at(1, low), at(1, begin), "axis dashed"),
              svg.dot(at(0, begin), "accent", 5), svg.dot(at(0.5, peak), "good", 6), svg.dot(at(1, begin), "bad", 6),
              svg.text((at(0.5, peak)[0], at(0.5, peak)[1] - 12), "peak", "label strong", "middle"),
              svg.text((at(1, begin)[0] + 10, at(1, begin)[1] - 10), "break-even", "label strong"),
              svg.text((at(0, begin)[0] + 12, at(0, begin)[1] + 20), "policy before the step", "label"),
              svg.text((66, 20), "success", "label", "end"),
              *(svg.text((at(m, low)[0], 250), f"{m:g}", "label small", "middle")
                for m in (0, 0.25, 0.5, 0.75, 1, 1.25)),
              svg.text((at(0.675, low)[0], 272), "length of the step, in break-evens", "label", "middle")]
    return svg.document(600, 280, parts, description)


def kappa(description: str) -> str:
    """κ(p) of the estimators at G = 8, from rf.kappa."""
    rates = [k / 100 for k in range(1, 100)]
    curves = (("maxrl", "MaxRL", "bad"), ("grpo", "GRPO", "accent thick"), ("rloo", "RLOO", "good"),
              ("dr_grpo", "Dr. GRPO", "near"))

    def at(p: float, value: float) -> tuple[float, float]:
        return 60 + 440 * p, 220 - 190 * value

    parts = [svg.line(at(0, 0), at(1, 0)), svg.line(at(0, 0), at(0, 1))]
    for name, _, style in curves:
        values = rf.kappa(torch.tensor(rates, dtype=torch.float64), 8, name).tolist()
        parts.append(svg.path([at(p, value) for p, value in zip(rates, values, strict=True)], style))
    for row, (_, label, style) in enumerate(curves):
        parts += [svg.line((525, 50 + 26 * row), (555, 50 + 26 * row), style),
                  svg.text((563, 54 + 26 * row), label, "label")]
    parts += [*(svg.text((at(p, 0)[0], 240), f"{p:g}", "label small", "middle") for p in (0, 0.25, 0.5, 0.75, 1)),
              *(svg.text((52, at(0, value)[1] + 4), f"{value:g}", "label small", "end") for value in (0, 0.5, 1)),
              svg.text((at(0.5, 0)[0], 262), "success rate p of the group", "label", "middle"),
              svg.text((40, 22), "κ", "label strong")]
    return svg.document(660, 270, parts, description)


def flow(description: str) -> str:
    """From rollouts to verdicts."""
    boxes = (("rollouts", "tokens, lengths,", "rewards, prompts"),
             ("one pass", "per token: log-prob,", "entropy, score"), ("one gradient", "∇ log π of each", "response"),
             ("two classes", "per prompt: means", "and spread"),
             ("estimates", "gap, alignment,", "break-even ± error"))
    parts: list[str] = []
    for at, (head, first, second) in enumerate(boxes):
        x = 8 + at * 152
        parts += [svg.box((x, 16), (128, 84), "panel"), svg.text((x + 64, 42), head, "label strong", "middle"),
                  svg.text((x + 64, 66), first, "label small", "middle"),
                  svg.text((x + 64, 84), second, "label small", "middle")]
        if at:
            parts.append(svg.arrow((x - 22, 58), (x - 3, 58), "accent"))
    return svg.document(760, 112, parts, description)


def ends(description: str) -> str:
    """Where the step meter looks: back over the last step from the rollouts sampled at its end."""
    parts = [svg.line((40, 70), (660, 70)), svg.arrow((130, 70), (352, 70), "accent thick"),
             svg.line((360, 70), (590, 70), "accent dashed"),
             svg.dot((130, 70), "other", 7), svg.dot((360, 70), "good", 8), svg.dot((590, 70), "other", 7),
             svg.text((130, 100), "θ − Δ: before the step", "label", "middle"),
             svg.text((360, 100), "θ: now, fresh rollouts", "label strong", "middle"),
             svg.text((590, 100), "θ + Δ: the same step again", "label", "middle"),
             svg.text((245, 58), "last update Δ", "label", "middle"),
             svg.text((130, 20), "gain of the step", "label good-ink", "middle"),
             svg.text((360, 20), "slope and curvature here", "label good-ink", "middle"),
             svg.text((590, 20), "log-probs, for slope and curvature", "label", "middle"),
             svg.line((130, 28), (130, 60), "axis dashed"), svg.line((360, 28), (360, 60), "axis dashed"),
             svg.line((590, 28), (590, 60), "axis dashed")]
    return svg.document(720, 116, parts, description)


def _task_success(theta: float, *, length: int, bound: int) -> float:
    """P(|Σ o_t| ≤ bound) for ``length`` tokens ±1 with P(+1) = σ(2θ): docs/simulate, the closed-form task."""
    p = 1 / (1 + math.exp(-2 * theta))
    counts: Sequence[int] = [k for k in range(length + 1) if abs(2 * k - length) <= bound]
    return sum(math.comb(length, k) * p ** k * (1 - p) ** (length - k) for k in counts)


DRAWINGS: dict[str, Callable[[str], str]] = {"gap": gap, "step": step, "kappa": kappa, "flow": flow, "ends": ends}
