"""What runs on this machine, and what to install for more: the findings behind ``rlvr-fast doctor``.

Packages are looked up by their metadata and not imported, so the answer takes no longer than importing torch. What is
*broken* (there, but of no use: too old a version, an extension that does not load, a GPU without its kernels) is told
apart from what is merely *absent*.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlvr_fast import command_line

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
    return Diagnosis({"machine": _machine(), "backends": _backends(), "GapMonitor": _tiers(),
                      "commands": _commands(), "frameworks": _frameworks()})


def show(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a table per section, and last what is broken."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 118)
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


def _at_least(name: str, version: str, oldest: tuple[int, ...], distribution: str = "") -> Finding:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers >= oldest:
        return Finding(name, OK, version)
    wanted = ".".join(map(str, oldest))
    return Finding(name, BROKEN, f"{version} is older than {wanted}", f"pip install '{distribution or name}>={wanted}'")


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


# Tier of rlvr_fast.monitor.METRICS: what it is fed beyond the one before, and what it then tells.
TIERS = (
    ("0 rewards or advantages", "mixed groups, success, share of the update that pushes down"),
    ("1 log-probs", "lengths and log-probs by class, trainer against sampler"),
    ("2 Σp² and entropy", "score norms, sharpening, whether the sampler is the policy"),
    ("3 hidden states", "the gap with its error, signal to noise, cosine with the update"),
    ("4 ModelGap", "the gap over all weights, predicted gain of the update"),
    ("5 measure_step", "learning rate over its measured break-even"),
)
FROM_LOGITS = 2  # these tiers' inputs come from the logits, and so from a backend


def _tiers() -> tuple[Finding, ...]:
    """All are possible wherever torch runs; what differs is the backend that serves them."""
    from rlvr_fast.backends import resolve

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = ", ".join(f"{resolve('auto', torch.device(device))} on {device}" for device in devices)
    return tuple(Finding(f"tier {name}", OK, f"{told} [{served}]" if tier >= FROM_LOGITS else told)
                 for tier, (name, told) in enumerate(TIERS))


# Part of a command -> the module it needs beyond the command's own, and the extra that brings it.
PARTS = {
    "rlvr-fast analyze, report: Parquet": ("pyarrow", "report"),
    "rlvr-fast bench: TRL as a peer": ("trl", "bench"),
}


def _commands() -> tuple[Finding, ...]:
    wanted = [(f"rlvr-fast {name}", modules, extra) for name, (modules, extra) in command_line.NEEDS.items()]
    wanted += [(name, (module,), extra) for name, (module, extra) in PARTS.items()]
    findings = []
    for name, modules, extra in wanted:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        findings.append(Finding(name, ABSENT, f"needs {', '.join(missing)}", command_line.pip_line(extra))
                        if missing else Finding(name, OK, "ready"))
    return tuple(findings)


@dataclass(frozen=True)
class Framework:
    """A training framework, and how the toolkit is switched on in it.

    Attributes:
        distribution: what pip calls it.
        door: the function or class to call, and the tiers it feeds.
        extra: of this package, that brings it; "" where it has its own way of being installed.
        oldest: the oldest version that the adapter knows; () where none is known to fail.
    """

    name: str
    distribution: str
    door: str
    extra: str = ""
    oldest: tuple[int, ...] = ()


FRAMEWORKS = (
    Framework("transformers", "transformers", "ModelGap(model, ...); token_stats on its hidden states", "trl"),
    Framework("PEFT", "peft", "ModelGap measures the adapters"),
    Framework("TRL", "trl", "integrations.trl.instrument(trainer), tiers 0 to 3 and the guard", "trl", (1, 0)),
    Framework("verl", "verl", "integrations.verl, tiers 0 to 2", "verl", (0, 9)),
    Framework("OpenRLHF", "openrlhf", "integrations.openrlhf.gap_metrics(monitor, experiences, ...), tiers 0 and 1"),
    Framework("SkyRL", "skyrl", "callbacks=[integrations.skyrl.GapCallback()], tiers 0 and 1"),
    Framework("prime-rl", "prime-rl", "integrations.prime_rl.with_gap_metrics(loss)"),
)


def _frameworks() -> tuple[Finding, ...]:
    findings = [Finding("your own loop", OK, "needs nothing more: GapMonitor, gradient_gap, StepGuard")]
    for framework in FRAMEWORKS:
        version = version_of(framework.distribution)
        if version is None:
            findings.append(Finding(framework.name, ABSENT, "not installed",
                                    command_line.pip_line(framework.extra) if framework.extra else ""))
            continue
        found = _at_least(framework.name, version, framework.oldest, framework.distribution)
        if found.state == OK:
            found = replace(found, found=f"{version}: {framework.door}{_plug_in(framework.distribution)}")
        findings.append(found)
    return tuple(findings)


def _plug_in(distribution: str) -> str:
    """verl loads plug-ins by their entry point, which a package that was not installed by pip does not have."""
    if distribution != "verl":
        return ""
    registered = metadata.entry_points(group="verl.plugins", name="rlvr_fast")
    return "; its plug-in is registered" if registered else "; no plug-in registered: call install()"
