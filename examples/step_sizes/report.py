"""The summary of a sweep as tables."""

from __future__ import annotations

from rich.console import Console

from rlvr_fast.simulate.output import table


def show(summary: dict, console: Console) -> None:
    console.width = max(console.width, 118)  # piped output would be folded at 80
    by_rate = [[row["length"], row["guard"], f"{row['rate']:.2g}", f"{row['start']:.3f}",
                f"{row['final']:.3f} ({row['final_lowest']:.3f} to {row['final_highest']:.3f})",
                f"{row['collapsed']} of {row['runs']}"] for row in summary["by_rate"]]
    console.print(table("Final success", ["length", "guard", "rate", "start", "mean (range)", "collapsed"], by_rate))
    verdicts = [[method, verdict, *cells.values()] for method, rows in summary["verdicts"].items()
                for verdict, cells in rows.items()]
    console.print(table("Verdicts before the step, no guard",
                        ["method", "verdict", "steps", "share that lost", "mean change"], verdicts))
    for title, key in (("Announcements, no guard", "announcements"), ("Measured and true break-even", "fidelity")):
        rows = summary[key]
        names = list(next(iter(rows.values())))
        console.print(table(title, ["", *rows], [[name, *(_cell(row[name]) for row in rows.values())]
                                                 for name in names]))
    console.print(table("Thresholds, no guard", ["", "runs"], [list(item) for item in summary["thresholds"].items()]))
    if summary["guards"]:
        names = [name for name in summary["guards"][0] if name != "final_by_rate"]  # that is in the first table
        console.print(table("Guards", ["", *(str(i + 1) for i in range(len(summary["guards"])))],
                            [[name, *(row[name] for row in summary["guards"])] for name in names]))
    for method, rows in summary["by_fraction"].items():
        console.print(table(f"Steps by their fraction of break-even, known before them, {method}",
                            ["from", "to", "steps", "share that lost", "mean change"],
                            [list(row.values()) for row in rows]))
    console.print(table("True break-even by response length",
                        ["tokens", "success from", "to", "steps", "norm", "learning rate"],
                        [list(row.values()) for row in summary["lengths"]]))


def _cell(value):
    return ", ".join(f"{item:.2f}" for item in value) if isinstance(value, list) else value
