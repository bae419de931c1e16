"""Directives that make parts of pages from the package and from committed measurements, while the site is built.

    {api} TOPIC          the public names of a topic             {command-line}    every command with its options
    {metrics-table}      every metric of GapMonitor              {benchmarks}      every CSV of bench/results
    {gpu-targets}        what a GPU run is held against          {fidelity}        levels as proxies, measured
    {diagram} NAME       a drawing of site_tools.diagrams        {printed}         what the Python above prints
    {integrations}       every adapter                           {pages-if-there}  in the navigation, those that exist
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from site_tools import api, benchmarks, command_line, diagrams, examples, metrics

BENCH = Path(__file__).resolve().parents[2] / "bench"


class Generated(SphinxDirective):
    """A directive that stands for Markdown."""

    def markdown(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        parent = nodes.Element()
        self.state.nested_parse(StringList(self.markdown().splitlines(), self.env.docname), 0, parent,
                                match_titles=True)
        return parent.children


class MetricsTable(Generated):
    def markdown(self) -> str:
        return metrics.reference()


class CommandLine(Generated):
    def markdown(self) -> str:
        return command_line.reference()


class Api(Generated):
    required_arguments = 1

    def markdown(self) -> str:
        return api.reference(self.arguments[0])


class Integrations(Generated):
    def markdown(self) -> str:
        return api.integrations()


class Benchmarks(Generated):
    def markdown(self) -> str:
        for path in benchmarks.files(BENCH):
            self.env.note_dependency(str(path))
        return benchmarks.results(BENCH)


class GpuTargets(Generated):
    def markdown(self) -> str:
        return benchmarks.gpu_targets(BENCH)


class Fidelity(Generated):
    def markdown(self) -> str:
        return benchmarks.fidelity(BENCH)


class PagesIfThere(Generated):
    """A hidden toctree of the pages that the named folders have, if there are such folders: README first."""

    required_arguments = 1
    optional_arguments = 8

    def markdown(self) -> str:
        found = [f"/{page}" for folder in self.arguments for page in sorted(
            (page for page in self.env.found_docs if page.startswith(f"{folder}/")),
            key=lambda page: (not page.endswith("/README"), page))]
        return "\n".join(["```{toctree}", ":hidden:", "", *found, "```"]) if found else ""


class Printed(SphinxDirective):
    """What the Python above it prints, run while the site is built."""

    def run(self) -> list[nodes.Node]:
        page = Path(self.env.doc2path(self.env.docname))
        text = examples.printed_before(page, self.lineno)
        if not text:
            raise self.error("the Python above prints nothing")
        return [nodes.literal_block(text, text, language="text", classes=["printed"])]


class Diagram(SphinxDirective):
    """An SVG inside the page, so that it takes the page's colours, light and dark. Content: its description."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012 - docutils reads it from the class

    def run(self) -> list[nodes.Node]:
        figure = nodes.container(classes=["diagram"])
        figure += nodes.raw("", diagrams.draw(self.arguments[0], self.options["alt"]), format="html")
        self.state.nested_parse(self.content, self.content_offset, figure)
        return [figure]


DIRECTIVES = {"api": Api, "benchmarks": Benchmarks, "command-line": CommandLine, "diagram": Diagram,
              "fidelity": Fidelity, "gpu-targets": GpuTargets, "integrations": Integrations,
              "metrics-table": MetricsTable, "pages-if-there": PagesIfThere, "printed": Printed}


def setup(app: Sphinx) -> None:
    for name, directive in DIRECTIVES.items():
        app.add_directive(name, directive)
