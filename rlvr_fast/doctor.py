"""What runs on this machine, and what to install for more: the findings behind ``rlvr-fast doctor``.

Packages are looked up by their metadata and not imported, so the answer takes no longer than importing torch. What is
*broken* (there, but of no use: too old a version, an extension that does not load, a GPU without its kernels) is told
apart from what is merely *absent*.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OK, ABSENT, BROKEN = "ok", "absent", "broken"
MARKS = {OK: "[green]ok[/]", ABSENT: "[yellow]–[/]", BROKEN: "[red]broken[/]"}
OLDEST_TORCH, OLDEST_TRITON = (2, 11), (3, 6)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        subject: what was looked at.
        state: "ok", "absent" or "broken".
        found: version, device or reason, in words.
        advice: what to do for more; empty where nothing is missing.
    """

    subject: str
    state: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings by section, in the order in which they are shown."""

    sections: dict[str, tuple[Finding, ...]]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(finding for section in self.sections.values() for finding in section if finding.state == BROKEN)

    def to_json(self) -> dict[str, list[dict[str, str]]]:
        return {name: [asdict(finding) for finding in section] for name, section in self.sections.items()}


def examine() -> Diagnosis:
    """Look at this machine. Raises nothing: what fails is a finding."""
    return Diagnosis({"machine": _machine(), "backends": _backends(), "commands": _commands(),
                      "frameworks": _frameworks()})


def show(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a table per section, and last what is broken."""
    console = console or Console(highlight=False)
    for name, section in diagnosis.sections.items():
        table = Table(title=name, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
        for column in ("subject", "state", "found"):
            table.add_column(column, no_wrap=column != "found")
        for finding in section:
            table.add_row(escape(finding.subject), MARKS[finding.state],
                          escape("; ".join(text for text in (finding.found, finding.advice) if text)))
        console.print(table, "")
    for finding in diagnosis.broken:
        console.print(f"[red]broken[/]: {escape(finding.subject)}: {escape(finding.found)}. {escape(finding.advice)}")


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None without it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> tuple[Finding, ...]:
    findings = [
        Finding("Python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _at_least("torch", torch.__version__, OLDEST_TORCH),
        Finding("CPU", OK, f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"),
    ]
    triton = version_of("triton")
    if triton is not None:
        findings.append(_at_least("triton", triton, OLDEST_TRITON))
    elif torch.cuda.is_available():
        findings.append(Finding("triton", BROKEN, "a GPU is there, triton is not",
                                "pip install the triton of this torch (Linux)"))
    else:
        findings.append(Finding("triton", ABSENT, "needed on a GPU only"))
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but sees no device" \
            if torch.version.cuda else f"torch {torch.__version__} is a CPU build"
        findings.append(Finding("GPU", ABSENT, built, "everything runs on the CPU; kernels need a CUDA or ROCm build "
                                                      "of torch and a device"))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        old = torch.version.hip is None and (properties.major, properties.minor) < (8, 0)
        findings.append(Finding(f"GPU {index}", BROKEN if old else OK, name,
                                "kernels are built for compute capability 8.0 and later" if old else ""))
    return tuple(findings)


def _at_least(name: str, version: str, oldest: tuple[int, ...]) -> Finding:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers >= oldest:
        return Finding(name, OK, version)
    wanted = ".".join(map(str, oldest))
    return Finding(name, BROKEN, f"{version} is older than {wanted}", f"pip install '{name}>={wanted}'")


def _backends() -> tuple[Finding, ...]:
    """Each backend on the device it is made for; the first one that is "ok" for a device is what "auto" takes."""
    from rlvr_fast.backends import available, cuda_rows

    on_cpu = available("cpu")
    findings = [_native(on_cpu["native"]), Finding("torch (any device)", OK, "always there, the fallback")]
    if torch.cuda.is_available():
        on_gpu = available("cuda")
        for name, reason in (("triton (GPU)", on_gpu["triton"]),
                             ("CUDA rows (GPU)", cuda_rows.unavailable(torch.device("cuda")))):
            findings.append(Finding(name, OK, "ready") if reason is None else Finding(
                name, BROKEN if name.startswith("triton") else ABSENT, reason, "see the reason"))
    else:
        findings.append(Finding("triton (GPU)", ABSENT, "no GPU",
                                "TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"))
    return tuple(findings)


def _native(reason: str | None) -> Finding:
    if reason is None:
        from rlvr_fast import _native

        return Finding("native (CPU)", OK, f"instruction set {_native.instruction_set()}")
    folder = Path(__file__).parent
    built = any(folder.glob("_native*.so")) or any(folder.glob("_native*.pyd"))
    return Finding("native (CPU)", BROKEN if built else ABSENT, reason,
                   "reinstall with a C++17 compiler on PATH; until then torch serves the CPU, 1.5 to 6 times slower")


# Command or function -> what it imports beyond the package's own requirements, and the extra that brings it.
COMMANDS = {
    "rlvr-fast profile, doctor": ((), ""),
    "rlvr-fast simulate": (("matplotlib",), "simulate"),
    "rlvr-fast report": (("plotly", "jinja2"), "report"),
}


def _commands() -> tuple[Finding, ...]:
    findings = []
    for name, (modules, extra) in COMMANDS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        findings.append(Finding(name, ABSENT, f"needs {', '.join(missing)}", f"pip install 'rlvr-fast[{extra}]'")
                        if missing else Finding(name, OK, "ready"))
    return tuple(findings)


# Framework -> distribution, and how the toolkit is switched on in it.
FRAMEWORKS = {
    "transformers": ("transformers", "ModelGap, token_stats on hidden states"),
    "PEFT": ("peft", "ModelGap measures the adapters"),
    "TRL": ("trl", "integrations.trl.instrument(trainer)"),
}


def _frameworks() -> tuple[Finding, ...]:
    findings = [Finding("your own loop", OK, "needs nothing more")]
    for name, (distribution, door) in FRAMEWORKS.items():
        version = version_of(distribution)
        findings.append(Finding(name, ABSENT, "not installed") if version is None
                        else Finding(name, OK, f"{version}: {door}"))
    return tuple(findings)
