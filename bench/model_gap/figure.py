"""The figure of the fidelity report, from its JSON alone."""

from __future__ import annotations

from pathlib import Path

LEVELS = {"logits": "#9aa5b1", "hidden": "#d9a441", "head": "#1f6fb4"}
WHOLE = "#444444"


def draw(report: dict, path: Path) -> None:
    """Four panels; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    picture = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(2, 2)
    _levels(panels[0, 0], report)
    _ranks(panels[0, 1], report)
    _layers(panels[1, 0], report)
    _sketch(panels[1, 1], report)
    picture.savefig(path, dpi=120)


def _levels(axis, report: dict) -> None:
    truth = report["truth"]
    for name, colour in LEVELS.items():
        entry = report["methods"][name]
        points = [(t, v, s, o) for t, v, s, o in zip(truth["norm_sq"], entry["norm_sq"], entry["stderr"],
                                                     truth["stderr"], strict=True) if t > 0 and v > 0]
        if points:
            whole, values, errors, others = zip(*points, strict=True)
            axis.errorbar(whole, values, xerr=_below(others, whole), yerr=_below(errors, values), fmt="o", color=colour,
                          label=name, elinewidth=0.6, markersize=5)
    axis.set(xscale="log", yscale="log", xlabel="gap norm² over all parameters ± stderr", ylabel="at the level")
    axis.set_title(f"each of {len(truth['norm_sq'])} prompts", fontsize=10)
    axis.legend(fontsize=8)


def _below(errors, values) -> list:
    """Error bars that stay on a logarithmic axis."""
    return [[min(e, 0.95 * v) for e, v in zip(errors, values, strict=True)], list(errors)]


def _ranks(axis, report: dict) -> None:
    names = list(report["methods"])[::-1]
    ranks = [report["methods"][name]["rank"] for name in names]
    values = [rank["spearman"] for rank in ranks]
    spread = [[max(0.0, rank["spearman"] - rank["low"]) for rank in ranks],
              [max(0.0, rank["high"] - rank["spearman"]) for rank in ranks]]
    axis.barh(names, values, xerr=spread, ecolor="#999999", color=[LEVELS.get(name, WHOLE) for name in names])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlim=(-1, 1.02), xlabel="rank correlation with all parameters' gap norm² (95 % bootstrap)")
    axis.tick_params(labelsize=8)


def _layers(axis, report: dict) -> None:
    names = [name for name in report["layers"] if name.startswith("layer ")]
    entries = [report["layers"][name] for name in names]
    numbers = [int(name.split()[1]) for name in names]
    axis.fill_between(numbers, [100 * e["p20"] for e in entries], [100 * e["p80"] for e in entries], color="#cfe0ef")
    label = "of all prompts (band: p20 to p80)"
    axis.plot(numbers, [100 * e["share"] for e in entries], color=LEVELS["head"], label=label)
    rest = {name: e["share"] for name, e in report["layers"].items() if name not in names}
    axis.set(xlabel="layer", ylabel="% of the gap norm²", ylim=(0, None))
    axis.set_title("; ".join(f"{name} {100 * share:.1f} %" for name, share in rest.items()), fontsize=10)
    axis.legend(fontsize=8)


def _sketch(axis, report: dict) -> None:
    truth = report["truth"]["norm_sq"]
    order = sorted(range(len(truth)), key=lambda p: truth[p])
    for name, entry in report["methods"].items():
        if name.startswith("sketch"):
            axis.plot([entry["norm_sq"][p] / truth[p] for p in order], "o", markersize=5, label=name)
    relative = [report["truth"]["stderr"][p] / truth[p] for p in order]
    axis.fill_between(range(len(order)), [1 - r for r in relative], [1 + r for r in relative], color="#eeeeee",
                      label="stderr from 8 responses" if report["responses per prompt"] == 8 else "stderr")
    axis.axhline(1, color=WHOLE, linewidth=0.8)
    axis.set(xlabel="prompts by gap norm²", ylabel="sketched / exact gap norm²", ylim=(0, 2))
    axis.legend(fontsize=8)
