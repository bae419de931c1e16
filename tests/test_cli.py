"""The command line as a whole: exit codes, errors in one line, JSON on stdout alone, extras, progress on stderr."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import rlvr_fast
from rlvr_fast import command_line
from rlvr_fast.cli import app

COMMANDS = ("demo", "profile", "bench", "doctor", "analyze", "report", "simulate")
NEEDS_REPORT = pytest.mark.skipif(importlib.util.find_spec("plotly") is None or
                                  importlib.util.find_spec("jinja2") is None, reason="needs the extra report")


def invoke(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


def strict_json(text: str):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def one_line(stderr: str) -> str:
    """The message, which is all that was written."""
    line, = stderr.splitlines()
    assert line.startswith("rlvr-fast: ")
    return line


@pytest.fixture
def no_needs(monkeypatch):
    """Every command may start, whatever is installed: what is tested comes before anything is imported."""
    monkeypatch.setattr(command_line, "NEEDS", dict.fromkeys(command_line.NEEDS, ((), "")))


@pytest.fixture
def dump(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i // 4}", "reward": i % 2, "step": i // 8}) + "\n"
                            for i in range(16)))
    return path


@pytest.fixture
def overshooting_run(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step, "rlvr/lr/ratio": ratio}) + "\n"
                            for step, ratio in enumerate((0.2, 0.7, 1.6))))
    return path


# -- what is there -----------------------------------------------------------------------------------------------------


def test_the_version_is_the_package_s():
    assert invoke("--version").stdout == f"rlvr-fast {rlvr_fast.__version__}\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rlvr_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rlvr-fast {rlvr_fast.__version__}\n"


def test_the_help_lists_every_command_and_the_exit_codes():
    done = invoke("--help")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "Exit codes: 0" in done.stdout
    assert "130" in done.stdout


@pytest.mark.parametrize("command", [(name,) for name in COMMANDS if name != "simulate"] + [("simulate", "collapse")])
def test_every_command_speaks_json(command):
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


# -- bad usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("simulate", "collapse")])
def test_an_unknown_option_is_named(command):
    done = invoke(*command, "--no-such-option")
    assert done.exit_code == 2
    assert "--no-such-option" in done.stderr
    assert done.stdout == ""


def test_an_unknown_command_is_named():
    done = invoke("conquer")
    assert done.exit_code == 2
    assert "conquer" in done.stderr


@pytest.mark.parametrize("command", ["analyze", pytest.param("report", marks=NEEDS_REPORT)])
def test_a_missing_file_is_named(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(command, tmp_path / "nowhere.jsonl")
    assert done.exit_code == 2
    assert "nowhere.jsonl" in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("demo", "--quick"), ("bench", "--quick"), ("simulate", "collapse", "--quick")])
def test_a_folder_that_cannot_be_made_stops_a_command_before_it_works(command, tmp_path, no_needs, monkeypatch):
    monkeypatch.setattr("rlvr_fast.demo.command.safe_and_large", pytest.fail)
    monkeypatch.setattr("rlvr_fast.bench.timings.measure", pytest.fail)
    monkeypatch.setattr("rlvr_fast.simulate.collapse.run", pytest.fail)
    (tmp_path / "file").touch()
    done = invoke(*command, "--output", tmp_path / "file" / "out")
    assert done.exit_code == 2
    assert str(tmp_path / "file") in one_line(done.stderr)


@pytest.mark.parametrize(("path", "message"), [("no/such/page.html", "in an existing folder"),
                                               (".", "in an existing folder")])
@pytest.mark.parametrize("command", [
    ("profile", "--model", "qwen2.5-7b", "--json"), ("bench", "--json"),
    pytest.param(("report", "steps.jsonl", "--output"), marks=NEEDS_REPORT)])
def test_a_file_that_cannot_be_written_stops_a_command_before_it_works(command, path, message, tmp_path, no_needs,
                                                                        monkeypatch):
    monkeypatch.setattr("rlvr_fast.profile.command.profile", pytest.fail)
    monkeypatch.setattr("rlvr_fast.bench.timings.measure", pytest.fail)
    monkeypatch.chdir(tmp_path)
    done = invoke(*command, path)
    assert done.exit_code == 2
    assert message in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("demo",), ("bench",), ("report", "run"), ("simulate", "collapse", "-o", "out")])
def test_a_missing_package_is_named_with_the_line_for_pip_before_anything_runs(command, tmp_path, monkeypatch):
    monkeypatch.setitem(command_line.NEEDS, command[0], (("a_module_that_is_not",), "made-up"))
    monkeypatch.chdir(tmp_path)
    done = invoke(*command)
    assert done.exit_code == 2
    assert one_line(done.stderr) == \
        f"rlvr-fast: {command[0]} needs a_module_that_is_not: pip install 'rlvr-fast[made-up]'"
    assert not list(tmp_path.iterdir())


# -- errors on the way -------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> typer.Typer:
    """A command line like ours, with one command that raises."""
    failing = typer.Typer(cls=command_line.Commands, pretty_exceptions_enable=False)

    @failing.callback()
    def options() -> None:
        pass

    @failing.command()
    def fail() -> None:
        raise error

    return failing


@pytest.mark.parametrize(("error", "exit_code", "message"), [
    (ValueError("shape must be N,V,D"), 2, "rlvr-fast: shape must be N,V,D\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.json"), 2, "rlvr-fast: [Errno 2] No such file: 'x.json'\n"),
    (ImportError("no module"), 2, "rlvr-fast: no module\n"),
    (MemoryError(), 2, "rlvr-fast: not enough memory: MemoryError\n"),
    (torch.OutOfMemoryError("CUDA out of memory.\nSee elsewhere"), 2,
     "rlvr-fast: not enough memory: CUDA out of memory.\n"),
    (KeyboardInterrupt(), 130, "rlvr-fast: interrupted\n"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
])
def test_an_error_is_one_line_and_an_exit_code(error, exit_code, message):
    done = CliRunner().invoke(raising(error), ["fail"])
    assert (done.exit_code, done.stderr) == (exit_code, message)


def test_what_torch_cannot_allocate_on_the_cpu_is_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    done = CliRunner().invoke(raising(caught.value), ["fail"])
    assert done.exit_code == 2
    assert "not enough memory" in one_line(done.stderr)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_a_defect_of_ours_keeps_its_traceback(error):
    done = CliRunner().invoke(raising(error("what we did not expect")), ["fail"])
    assert isinstance(done.exception, error)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_a_run_with_130_and_a_line(tmp_path):
    pytest.importorskip("matplotlib")
    process = subprocess.Popen([sys.executable, "-u", "-m", "rlvr_fast", "demo", "-o", str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               # A shell's background jobs ignore interrupts, and their children inherit that.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert "Supervised warm-up" in process.stdout.readline()  # it trains from here on
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "rlvr-fast: interrupted\n")
    assert not list(tmp_path.iterdir())


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_doctor_and_analyze_print_json_and_nothing_else(dump):
    assert {"machine", "backends", "GapMonitor", "commands", "frameworks"} == strict_json(invoke("doctor", "--json")
                                                                                         .stdout).keys()
    done = invoke("analyze", dump, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert strict_json(done.stdout)["summary"]["responses"] == 16


def test_a_simulation_prints_what_its_file_holds(tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke("simulate", "threshold", "--quick", "-o", tmp_path, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert strict_json(done.stdout) == strict_json((tmp_path / "threshold.json").read_text())
    assert (tmp_path / "threshold.png").stat().st_size > 0


@NEEDS_REPORT
def test_a_report_prints_its_headlines(overshooting_run, tmp_path):
    page = tmp_path / "page.html"
    done = invoke("report", overshooting_run, "-o", page, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    content = strict_json(done.stdout)
    run, = content["runs"]
    assert content["page"] == str(page)
    assert (run["verdict"], run["word"], run["last_step"], run["steps"]) == ("overshoot", "overshoot", 2, 3)
    assert run["latest"]["fraction"] == {"step": 2, "value": 1.6, "stderr": None, "low": None, "high": None}
    assert run["sentence"] in page.read_text(encoding="utf-8")


@NEEDS_REPORT
def test_only_a_checked_report_of_a_bad_run_exits_with_1(overshooting_run, tmp_path):
    command = ("report", overshooting_run, "-o", tmp_path / "page.html")
    assert invoke(*command).exit_code == 0
    checked = invoke(*command, "--check")
    assert (checked.exit_code, checked.stdout) == (1, f"{tmp_path / 'page.html'}\n")
    steps = overshooting_run.read_text().splitlines(keepends=True)
    overshooting_run.write_text("".join(steps[:2]))
    assert invoke(*command, "--check").exit_code == 0


def test_json_is_strict_whatever_the_numbers(capsys):
    command_line.print_json({"a": float("nan"), 1: (float("-inf"), 2.0), "b": None})
    assert strict_json(capsys.readouterr().out) == {"a": None, "1": [None, 2.0], "b": None}


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terminal", "quiet", "shown"), [(True, False, True), (True, True, False),
                                                          (False, False, False)])
def test_progress_is_for_a_terminal_that_nobody_asked_to_be_quiet(terminal, quiet, shown, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", terminal)
    assert command_line.progress("x", quiet=quiet).live.console.stderr
    assert command_line.progress("x", quiet=quiet).disable is not shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_goes_to_stderr_where_that_is_a_terminal(dump):
    reader, terminal = os.openpty()
    done = subprocess.run([sys.executable, "-m", "rlvr_fast", "analyze", str(dump)], stdout=subprocess.PIPE,
                          stderr=terminal, check=True, text=True, env=os.environ | {"TERM": "xterm"})
    os.set_blocking(reader, False)
    shown = os.read(reader, 65536)  # what was written is there by now; it has nothing to wait for
    os.close(terminal)
    os.close(reader)
    assert b"reading" in shown
    assert "16 responses" in done.stdout
    assert "reading" not in done.stdout
