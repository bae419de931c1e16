"""The diagnosis of the machine: what it calls fine, absent and broken, and what the command does with it."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlvr_fast import command_line, doctor
from rlvr_fast.backends import native_backend, resolve
from rlvr_fast.cli import app
from rlvr_fast.monitor import METRICS


def finding(diagnosis: doctor.Diagnosis, subject: str) -> doctor.Finding:
    found, = (f for section in diagnosis.sections.values() for f in section if f.subject == subject)
    return found


def test_the_versions_in_use_are_reported():
    diagnosis = doctor.examine()
    assert finding(diagnosis, "torch") == doctor.Finding("torch", doctor.OK, torch.__version__)
    assert finding(diagnosis, "torch (any device)").state == doctor.OK
    assert finding(diagnosis, "GPU" if not torch.cuda.is_available() else "GPU 0").state != doctor.BROKEN


@pytest.mark.parametrize(("version", "state"), [("2.10.1", doctor.BROKEN), ("2.11.0+cu130", doctor.OK),
                                                ("3.0.0.dev20260101", doctor.OK), ("2.9", doctor.BROKEN)])
def test_a_torch_that_is_too_old_is_broken(monkeypatch, version, state):
    monkeypatch.setattr(torch, "__version__", version)
    found = finding(doctor.examine(), "torch")
    assert found.state == state
    assert ("2.11" in found.advice) == (state == doctor.BROKEN)


def test_a_missing_extension_is_absent_and_one_that_does_not_load_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(native_backend, "_native", None)
    monkeypatch.setattr(native_backend, "IMPORT_ERROR", "undefined symbol: x", raising=False)
    (tmp_path / "doctor.py").touch()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    absent = finding(doctor.examine(), "native (CPU)")
    assert absent.state == doctor.ABSENT
    assert "undefined symbol: x" in absent.found
    (tmp_path / "_native.cpython-311.so").touch()
    assert finding(doctor.examine(), "native (CPU)").state == doctor.BROKEN


def test_a_gpu_without_triton_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda distribution: None)
    assert finding(doctor.examine(), "triton").state == doctor.ABSENT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor._machine()[-1].state == doctor.BROKEN


def test_a_command_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(command_line.NEEDS, "made-up", (("a_module_that_is_not",), "made-up"))
    monkeypatch.setitem(doctor.PARTS, "part of it", ("another_that_is_not", "other"))
    diagnosis = doctor.examine()
    found = finding(diagnosis, "rlvr-fast made-up")
    assert (found.state, found.advice) == (doctor.ABSENT, "pip install 'rlvr-fast[made-up]'")
    assert "a_module_that_is_not" in found.found
    assert finding(diagnosis, "part of it").advice == "pip install 'rlvr-fast[other]'"


def test_every_command_and_every_extra_it_names_exists():
    extras = {extra for _, extra in (*command_line.NEEDS.values(), *doctor.PARTS.values())}
    extras |= {framework.extra for framework in doctor.FRAMEWORKS}
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        assert extras - {""} <= tomllib.load(file)["project"]["optional-dependencies"].keys()
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert commands | {group.name for group in app.registered_groups} == set(command_line.NEEDS)


@pytest.mark.parametrize("framework", doctor.FRAMEWORKS, ids=lambda framework: framework.name)
def test_a_framework_is_absent_ready_or_too_old(monkeypatch, framework):
    def found_at(version):
        monkeypatch.setattr(doctor, "version_of", {framework.distribution: version}.get)
        return next(found for found in doctor._frameworks() if found.subject == framework.name)

    assert found_at(None).state == doctor.ABSENT
    ready = found_at("99.1.dev3")
    assert ready.state == doctor.OK
    assert ready.found.startswith(f"99.1.dev3: {framework.door}")
    if framework.oldest:
        old = found_at("0.0.1")
        assert old.state == doctor.BROKEN
        assert old.advice == f"pip install '{framework.distribution}>={'.'.join(map(str, framework.oldest))}'"


@pytest.mark.parametrize(("entry_points", "told"), [((), "call install()"), (("rlvr_fast",), "is registered")])
def test_verl_is_told_whether_it_will_find_the_plug_in(monkeypatch, entry_points, told):
    monkeypatch.setattr(doctor, "version_of", {"verl": "0.9.1"}.get)
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: entry_points)
    assert told in finding(doctor.examine(), "verl").found


def test_every_tier_of_the_monitor_is_listed_with_the_backend_that_serves_it():
    diagnosis = doctor.examine()
    tiers = diagnosis.sections["GapMonitor"]
    assert [int(found.subject.split()[1]) for found in tiers] == sorted({metric.tier for metric in METRICS})
    served = f"{resolve('auto', torch.device('cpu'))} on cpu"
    assert [served in found.found for found in tiers] == [False, False, True, True, True, True]


def test_the_command_prints_every_finding_and_exits_with_0():
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    for section in ("machine", "backends", "GapMonitor", "commands", "frameworks"):
        assert section in done.stdout
    assert torch.__version__ in done.stdout


def test_the_command_speaks_json():
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(done.stdout) == doctor.examine().to_json()


def test_what_is_broken_makes_the_exit_code_1(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "pip install 'torch>=2.11'" in done.stdout.replace("\n", " ")
