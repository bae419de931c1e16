"""Sections to one HTML file: everything inside it, nothing fetched, every text escaped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlvr_fast.report import breakdown, figures
from rlvr_fast.report.load import Recorded, Series, load
from rlvr_fast.report.others import others_section
from rlvr_fast.report.section import VERDICT_COLOURS, Section, number, text
from rlvr_fast.report.verdicts import SEVERITY, headline
from rlvr_fast.whole_file import replace_file

RUNS = 6  # in the figures; as many as there are colours
UNKNOWN = 20  # ignored keys that are named

# Section -> its title and what to log for it.
MISSING = {
    "step": ("Is the step safe?", "log StepGuard.metrics() or StepReading.summary() of a StepMeter "
             "(rlvr/step/meter/...), a StepCurve.summary() (rlvr/step/scan/...), or a measured step with "
             "GapMonitor (rlvr/lr/ratio)"),
    "whom": ("For which prompts", "log StepReading.summary(), whose bin_... keys tell prompts by their success rate"),
    "success": ("Success over steps", "log rlvr/group/p_mean of GapMonitor.compute(), or lay a rollout dump beside it"),
    "gain": ("What each step gained", "log StepReading.summary() (rlvr/step/meter/gain) or StepMeasure.summary()"),
    "gap": ("Gradient gap", "log gap.summary() or GapMonitor.compute() (rlvr/gap/norm_sq with its error)"),
    "alignment": ("Does the update follow the gap?", "log GapMonitor.compute() (rlvr/gap/cos_update, "
                  "rlvr/signal_to_noise)"),
    "groups": ("Mixed, solved and failed groups", "log gap.summary() or GapMonitor.compute() (rlvr/group/frac_...)"),
    "length": ("Response lengths", "log GapMonitor.compute() (rlvr/length/...), or a rollout dump with lengths"),
    "spectrum": ("Difficulty spectrum", "RunLog.detail(spectrum=rf.difficulty_spectrum(...)), or a rollout dump"),
    "interference": ("Prompts that oppose each other", "RunLog.detail(interference=result.conflicts()), with a "
                     "ModelGap of method 'sketch'"),
    "tokens": ("Tokens that tell correct from incorrect", "RunLog.detail(tokens=rf.gradient_gap(..., level='logits'))"),
    "prompts": ("Prompt by prompt", "RunLog.detail(spectrum=...), or a rollout dump"),
}


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str], *,
                 rollouts: str | os.PathLike[str] | None = None,
                 columns: Mapping[str, str | None] | None = None, threshold: float | None = None,
                 title: str | None = None) -> Path:
    """Write one HTML file about a run, readable offline, on paper and without JavaScript.

    Args:
        run: a folder (metrics.jsonl of ``RunLog``, or steps.jsonl, trainer_state.json, checkpoint-*/, any other JSONL
            files of steps; with rollouts* and details.json beside them), or one such file. One JSON object per step;
            known keys are in ``report.keys``, the numbers of others are listed.
        output: the file to write; its folder must exist. Replaced all at once.
        rollouts: a rollout dump elsewhere; ``columns`` and ``threshold`` as in ``rlvr_fast.analyze.analyze``.
        title: of the page; the run's name by default.

    Returns:
        The file.

    Raises:
        ValueError: naming the file, line or key of what cannot be read; if there is nothing to show.
        ImportError: without plotly or jinja2.
    """
    output = Path(output)
    if not output.parent.is_dir() or output.is_dir():
        raise ValueError(f"output must be a file in a folder that exists, got {output}")
    recorded = load(Path(run), rollouts=rollouts, columns=columns, threshold=threshold)
    return write_page(recorded, output, title or Path(run).resolve().name)


def write_page(recorded: Recorded, output: Path, title: str) -> Path:
    """Write what was read as a page; a page that was there before stays whole until the new one is."""
    replace_file(output, render(recorded, title))
    return output


def render(recorded: Recorded, title: str) -> str:
    """The page as text."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"a report needs plotly and jinja2 ({error}): pip install 'rlvr-fast[report]'") from None

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    with np.errstate(all="ignore"):  # logs hold what they hold: an overflow becomes an infinity, and that no number
        sections, headlines = sections_of(recorded), [headline(run) for run in recorded.series]
    numbers = {key for _, key in recorded.others}
    ignored = [(key, count) for key, count in recorded.unknown.most_common() if key not in numbers]
    present = {section.id for section in sections}
    steps = sorted({int(step) for run in recorded.series for step in run.step[[0, -1]]})
    return environment.get_template("report.html.j2").render(
        title=text(title), source=text(recorded.source), n_rows=recorded.n_rows, runs=recorded.series,
        first=steps[0] if steps else None, last=steps[-1] if steps else None,
        rollouts=recorded.rollouts, headlines=headlines, sections=sections,
        missing=[content for name, content in MISSING.items() if name not in present], notes=_notes(recorded),
        unknown=[(text(key, 60), count) for key, count in ignored[:UNKNOWN]], n_unknown=len(ignored),
        colours=VERDICT_COLOURS, severity=SEVERITY, number=number, text=text,
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        figures=island({section.id: section.figure for section in sections if section.figure is not None}))


def sections_of(recorded: Recorded) -> list[Section]:
    """Those that have data, in reading order."""
    runs: tuple[Series, ...] = recorded.series[:RUNS]
    over_steps = [build(runs) for build in (
        figures.step_section, breakdown.whom_section, figures.success_section, figures.gain_section,
        figures.gap_section, figures.alignment_section, figures.groups_section, figures.length_section)]
    across = []
    for build in (breakdown.spectrum_section, breakdown.interference_section, breakdown.tokens_section,
                  breakdown.prompts_section):
        try:
            across.append(build(recorded))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"details.json beside {recorded.source} is not as rf.RunLog writes it: "
                             f"{build.__name__.removesuffix('_section')}: {error!r}") from error
    return [section for section in (*over_steps, *across, others_section(recorded.others)) if section is not None]


def island(data: object) -> str:
    """JSON that is safe inside a script element, whatever its strings hold, and has no NaN."""
    encoded = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _notes(recorded: Recorded) -> list[str]:
    notes = [text(note, 400) for note in recorded.notes]
    if len(recorded.series) > RUNS:
        notes.append(f"The figures show {RUNS} of {len(recorded.series)} runs.")
    if recorded.rollouts is not None:
        notes += [text(f"Rollouts: {note}.", 400) for note in recorded.rollouts["notes"]]
        if len(recorded.series) > 1:
            notes.append("Rollouts: the log holds several runs, so steps of the dump are not joined to it.")
    return notes
