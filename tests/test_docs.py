"""The documentation: its code runs, its command lines exist, everything public is on it, and it builds by itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import rlvr_fast as rf
from rlvr_fast.report.page import MISSING

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
if not (DOCS / "conf.py").is_file():  # an unpacked source distribution
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
sys.path.insert(0, str(DOCS))  # site_tools, and the policy of the examples
from site_tools import api, benchmarks, command_line, diagrams, examples  # noqa: E402

PAGES = sorted(path for path in DOCS.rglob("*.md"))
NARRATIVE = [DOCS / "index.md", *(path for folder in ("quickstart", "concepts", "frameworks")
                                  for path in sorted((DOCS / folder).glob("*.md")))]


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", NARRATIVE, ids=name_of)
def test_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in examples.runnable(page):
        examples.run(block, names)


def in_need() -> list[examples.Block]:
    return [block for page in NARRATIVE for block in examples.blocks(page, "python")
            if block.code.startswith(examples.NEEDS)]


@pytest.mark.parametrize("block", in_need(), ids=lambda block: f"{name_of(block.page)}:{block.line}")
def test_python_block_that_needs_other_packages_runs_where_they_are(block, tmp_path, monkeypatch):
    for package in block.code.splitlines()[0].removeprefix(examples.NEEDS).split(", "):
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(package).origin is None:
            pytest.skip(f"needs {package}")  # a folder of the documentation with that name is no package
    monkeypatch.chdir(tmp_path)
    examples.run(block, {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_of_a_page_parse(page):
    for block in examples.blocks(page, "python"):
        compile("\n" * (block.line - 1) + block.code, str(page), "exec")


def test_a_page_shows_what_its_last_block_prints(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\nprint('first')\n```\n\n```python\n# not run: no\nx = 5\n```\n\n"
                    "```python\nprint(x)\n```\n\nend\n", encoding="utf-8")
    assert [examples.printed_before(page, line) for line in (1, 5, 9, 15)] == ["", "first", "first", "1"]


def test_every_block_that_is_not_run_says_why():
    unrun = [block.code.splitlines()[0] for page in NARRATIVE for block in examples.blocks(page, "python")
             if block.code.startswith(examples.NOT_RUN.rstrip())]
    assert unrun
    assert all(len(line.removeprefix(examples.NOT_RUN)) > 8 for line in unrun)


# -- command lines ----------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The words of every ``rlvr-fast`` call in the blocks and code spans of a page, without the program's name."""
    text = page.read_text(encoding="utf-8")
    calls = re.compile(r"^(?:\$ |    )?rlvr-fast +([^\n|`]+)$|`rlvr-fast +([^`\n]+)`", re.MULTILINE)
    for found in calls.finditer(text):
        words = shlex.split((found[1] or found[2]).replace("…", "..."), comments=True)
        yield text.count("\n", 0, found.start()) + 1, words


@pytest.mark.parametrize("page", [DOCS / "index.md", DOCS / "faq.md", DOCS / "reading_the_report.md",
                                  *sorted((DOCS / "quickstart").glob("*.md"))], ids=name_of)
def test_command_lines_have_the_commands_and_options_of_the_program(page):
    for line, words in command_lines(page):
        bare = len(words) < 2  # a command that is only named
        try:
            command_line.check([*words, "something"] if bare and words[0] in ("analyze", "report") else words)
        except ValueError as error:
            pytest.fail(f"{name_of(page)}:{line}: {error}")


def test_a_wrong_command_line_is_noticed():
    for words in (["analyse", "x"], ["analyze", "x", "--no-such"], ["report"], ["simulate", "everything"]):
        with pytest.raises(ValueError, match="rlvr-fast"):
            command_line.check(words)


def test_programs_and_targets_that_pages_name_exist():
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for program in re.findall(r"\bpython ((?:examples|bench|docs)/[\w/]+\.py)", text):
            assert (ROOT / program).is_file(), f"{name_of(page)} names {program}"
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert target in targets, f"{name_of(page)} names make {target}"


# -- completeness -----------------------------------------------------------------------------------------------------


def test_every_public_name_is_described_once():
    described = [name for topic in api.TOPICS for name in api.names(topic)]
    assert sorted(described) == sorted(rf.__all__)
    for topic in api.TOPICS:
        assert f"{{api}} {topic}" in (DOCS / "reference" / f"{topic}.md").read_text(encoding="utf-8")


def test_names_that_pages_use_are_public():
    known = {*rf.__all__, "integrations"}
    for page in PAGES:
        for name in re.findall(r"\brf\.(\w+)", page.read_text(encoding="utf-8")):
            assert name in known, f"{name_of(page)} names rf.{name}"


def test_metric_keys_that_pages_use_exist():
    from rlvr_fast.monitor.metrics import METRICS, OVERHEAD

    known = {metric.key for metric in METRICS} | set(OVERHEAD)
    for page in [*DOCS.glob("*.md"), *DOCS.glob("quickstart/*.md"), *DOCS.glob("concepts/*.md")]:
        for key in re.findall(r"`(rlvr/[\w/]+)`", page.read_text(encoding="utf-8")):
            assert key in known or key.startswith("rlvr/step/"), f"{name_of(page)} names {key}"


def test_every_section_of_the_report_is_explained():
    titles = re.findall(r"^## (.+)$", (DOCS / "reading_the_report.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {title for title, _ in MISSING.values()} <= set(titles)


# -- generated parts --------------------------------------------------------------------------------------------------


def test_measurements_become_a_section_with_provenance_bars_and_absent_providers(tmp_path):
    (tmp_path / "results").mkdir()
    head = ("kernel,provider,shape,dtype,metric,p20,median,p80,ratio_to_gemm,extra_memory_share,error,error_of,rounds,"
            "device,threads,versions,git_sha,date,note")
    row = "token_stats,{},1x2x3,float32,milliseconds,{},{},0.01,0.001,max |x|,5,A CPU,2,torch 9,{},2026-01-02T03,{}"
    rows = [row.format(*cells) for cells in (
        ("gemm", "1,2,3", "1", "abcdef0123", ""), ("rlvr_fast", "0.5,1,1.5", "0.5", "abcdef0123", ""),
        ("older", "3,4,5", "2", "0123456789", ""), ("peer", ",,", "", "abcdef0123", "not there"))]
    (tmp_path / "results" / "other.csv").write_text("\n".join([head, *rows]), encoding="utf-8")
    text = benchmarks.results(tmp_path)
    for part in ("`bench/results/other.csv`", "A CPU", "2 thread(s)", "2026-01-02", "`abcdef012`"):
        assert part in text
    assert "| rlvr_fast | 1 (0.5 to 1.5) | 0.50 | 1.0% | 1.0e−03 |" in text
    assert r"| older \* |" in text  # of another run
    assert "peer: not there" in text
    assert text.count("<rect") == 3
    assert r"max \|x\|" not in text  # outside a table nothing is escaped


def test_gpu_targets_are_not_measured_until_a_csv_of_a_gpu_says_so():
    text = benchmarks.gpu_targets(ROOT / "bench")
    measured = any("gpu" in path.read_text(encoding="utf-8").splitlines()[0].split(",")
                   for path in (ROOT / "bench" / "results").glob("*.csv"))
    assert ("No GPU figure" in text) == (not measured)
    assert text.count("not measured") > 10 or measured


def test_gpu_targets_take_the_worst_kind_of_logits_of_a_committed_csv(tmp_path):
    (tmp_path / "gpu").symlink_to(ROOT / "bench" / "gpu")
    (tmp_path / "results").mkdir()
    rows = [f"token_stats,rlvr_fast triton,{shape},bfloat16,{kind},share of floor,,{share},,,A GPU,1,t,abc,2026,"
            for shape, kind, share in (("8192x152064x3584", "random", 0.9), ("8192x152064x3584", "peaked", 0.8),
                                       ("1x2x3", "random", 0.1))]
    head = "kernel,provider,shape,dtype,logits,metric,p20,median,p80,error,gpu,driver,versions,git_sha,date,note"
    (tmp_path / "results" / "gpu.csv").write_text("\n".join([head, *rows]), encoding="utf-8")
    text = benchmarks.gpu_targets(tmp_path)
    assert "Measured on A GPU" in text
    assert "| 80 % | first goal reached |" in text


def test_docstrings_keep_their_bars_and_their_code():
    pytest.importorskip("sphinx")
    from site_tools.docstrings import adapt

    assert adapt(["1/|o| in ``|x|``."]) == [r"1/\|o\| in ``|x|``."]
    assert adapt(["A sentence.", "", "    code()"]) == ["A sentence.", "", "::", "", "    code()"]
    for as_it_is in (["Like this::", "", "    code()"], ["Args:", "    x: y", "", "    more"], ["One.", "", "Two."]):
        assert adapt(as_it_is) == as_it_is


def test_formulas_become_mathml_or_stop_the_build():
    pytest.importorskip("sphinx")
    from site_tools.mathml import convert
    from sphinx.errors import ExtensionError

    assert "<mfrac>" in convert(r"\frac{a}{b}", block=True)
    with pytest.raises(ExtensionError, match="nosuchcommand"):
        convert(r"\nosuchcommand", block=False)


def test_drawings_are_well_formed_and_take_their_colours_from_the_page():
    for name in diagrams.DRAWINGS:
        drawing = ElementTree.fromstring(diagrams.draw(name, 'a "quoted" <description>'))
        assert drawing.get("aria-label") == 'a "quoted" <description>'
        assert not any(element.get("fill") or element.get("stroke") for element in drawing.iter())


# -- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; warnings are errors."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the site is built with the extra 'docs'")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(target / "cache"),
                           str(DOCS), str(target / "html")], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return target / "html"


def test_site_fetches_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"", text)
        assert not fetched, f"{page.relative_to(site)} fetches {fetched}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_links_inside_the_site_lead_somewhere(site):
    anchors = {page: set(re.findall(r"\bid=\"([^\"]+)\"", page.read_text(encoding="utf-8")))
               for page in site.rglob("*.html")}
    broken = []
    for page in anchors:
        for link in re.findall(r"<(?:a|img)[^>]*?(?:href|src)=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:|//", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target in anchors and anchor not in anchors[target]):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_every_page_is_in_the_navigation(site):
    menu = (site / "index.html").read_text(encoding="utf-8")
    for folder in ("trl", "verl", "frameworks", "simulate", "relay", "curriculum", "model_gap", "smollm2", "report"):
        if (DOCS / folder / "README.md").is_file():
            assert f'href="{folder}/README.html"' in menu


def test_generated_parts_hold_what_they_are_made_of(site):
    metrics = (site / "reference" / "metrics.html").read_text(encoding="utf-8")
    assert "rlvr/sharpening/control_z" in metrics
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert all(option in commands for option in ("--threshold", "--vocabulary-size", "--quick"))
    benchmarks = (site / "benchmarks.html").read_text(encoding="utf-8")
    for path in (ROOT / "bench" / "results").glob("*.csv"):
        assert path.name in benchmarks
    assert benchmarks.count("<svg") >= 5
    assert "<math" in (site / "theory.html").read_text(encoding="utf-8")


def test_files_read_by_relative_links_exist_on_a_code_host():
    """Links between the committed pages, which are also read unbuilt."""
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{name_of(page)} links to {link}"
