"""The report in a real browser: every figure drawn, in light and dark, with no message on the console."""

import re
import shutil
import subprocess

import pytest
from report_pages import Page
from report_runs import HOSTILE, full_run

from rlvr_fast.report import write_report

pytest.importorskip("plotly")
pytest.importorskip("jinja2")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--enable-logging=stderr", "--window-size=1280,2400", "--virtual-time-budget=10000")
LIGHT_BLUE, DARK_BLUE = "rgb(0, 114, 178)", "rgb(90, 180, 232)"


def browse(page, profile, *flags) -> tuple[str, list[str]]:
    """(the document after its scripts have run, what was written on the console)."""
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    full_run(folder, prompt_ids=[*HOSTILE, *(f"prompt {at}" for at in range(12))],
             decode=lambda token: HOSTILE[token % len(HOSTILE)])
    return write_report(folder, folder / "page.html", title=HOSTILE[1])


@pytest.mark.parametrize(("flags", "blue", "other"), [((), LIGHT_BLUE, DARK_BLUE),
                                                      (("--force-dark-mode",), DARK_BLUE, LIGHT_BLUE)])
def test_every_figure_is_drawn_in_the_colours_of_the_theme(page, tmp_path, flags, blue, other):
    document, console = browse(page, tmp_path, *flags)
    assert console == []
    drawn = Page(document)
    expected = set(Page(page).figures)
    assert f'data-drawn="{len(expected)}"' in document
    for name in expected:
        figure = re.search(rf'id="plot-{name}".*?</section>', document, re.S).group()
        assert 'class="main-svg"' in figure
        assert 'class="xtick"' in figure
    assert blue in document
    assert other not in document
    assert "var(--" not in re.search(r'id="plot-gap".*?</section>', document, re.S).group()
    # Plotly adds styles and images of its own; names of prompts add nothing.
    assert [tag for tag, _ in drawn.tags].count("script") == 3
    assert not [attributes for tag, attributes in drawn.tags if attributes.get("src") == "x" or "onerror" in attributes]


def test_tables_stand_open_in_the_file_and_are_folded_by_its_script(page, tmp_path):
    """Dumping a document needs scripts, so that without them only the file itself can be looked at."""
    in_file, in_browser = ([attributes for tag, attributes in one.tags if tag == "details"]
                           for one in (Page(page), Page(browse(page, tmp_path)[0])))
    assert len(in_file) == len(in_browser) >= 10
    assert all("open" in attributes for attributes in in_file)
    assert not any("open" in attributes for attributes in in_browser)


def test_an_error_of_a_page_would_be_seen(page, tmp_path):
    """The console is really read: the same page with a broken figure complains."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace('Plotly.react("plot-"', 'Plotly.react("no-"'),
                      encoding="utf-8")
    _, console = browse(broken, tmp_path / "profile")
    assert any("no-" in line for line in console)
