"""bench/gpu.sh: prepare a bare CUDA machine and run the stages, each in a process of its own.

    bench/gpu.sh OUTDIR [--stage NAME ...] [--wheels DIR] [--work DIR] [--dry-run] [options of the measuring stages]

Stages: check ceilings statistics gap gradient rows layers tune plots. All by default, each in at most nine minutes,
what prepares the machine included; they can be called one by one with the same OUTDIR, and the target table is made
anew from what is there at the end of each call.
The measuring stages' own options (--heads --tokens --logits --rounds --seconds --without) are passed on to them;
bench/gpu.sh OUTDIR --help-stages explains them.

Needs Python 3.11, torch and triton; nothing is installed outside the work folder (OUTDIR/work). Where this checkout's
rlvr_fast cannot be imported, a copy is put together there and its native parts are built if setuptools, pybind11 and a
compiler are there. Without a git repository the environment variable GIT_SHA says what is measured. Exit status 1 if a
stage failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURING = ("ceilings", "statistics", "gap", "gradient", "rows", "layers")
STAGES = ("check", *MEASURING, "tune", "plots")
STAGE_SECONDS = 530
BUILD_SECONDS = 150
RESERVE_SECONDS = 50  # imports, and the last case, which may take longer than those before
# As in setup.py.
MAPPED = {"rlvr_fast.kernels": REPOSITORY / "kernels", "rlvr_fast.bench": REPOSITORY / "bench" / "cpu"}
TUNER = REPOSITORY / "rlvr_fast" / "tuning.py"
TUNED_SHAPE = ("--hidden-size", "3584", "--vocabulary-size", "152064", "--tokens", "8192")  # what the targets name


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options, more = _options(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment((options.work or out / "work").resolve(), options)
    seconds = STAGE_SECONDS - (time.monotonic() - start)
    failed = []
    for name, command in _commands(options, out, more, seconds - RESERVE_SECONDS):
        status = _run(name, command, environment, out, seconds)
        if status:
            failed.append(f"{name} (exit status {status})")
    if failed:
        print("failed: " + ", ".join(failed), flush=True)
    _run("targets", [sys.executable, "-P", "-m", "gpu.targets", str(out)], environment, out, RESERVE_SECONDS)
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--wheels", type=Path, help="folder of wheels to be used; bench/fetch_peers.sh fills one")
    parser.add_argument("--work", type=Path, help="where the package is put together; default OUTDIR/work")
    parser.add_argument("--dry-run", action="store_true", help="everything but the launches, on the CPU")
    parser.add_argument("--help-stages", action="store_true", help="options of the measuring stages")
    return parser.parse_known_args(arguments)


def _commands(options: argparse.Namespace, out: Path, more: list[str], seconds: float) -> list[tuple[str, list[str]]]:
    """(name, command) in order. The dry run's stages share a process: what they would crash is not there."""
    python = [sys.executable, "-P", "-m"]
    if options.help_stages:
        return [("help", [*python, "gpu.stages", "--help"])]
    dry = ["--dry-run"] if options.dry_run else []
    measure = [*python, "gpu.stages", "--out", str(out), "--git-sha", git_sha(), "--seconds", f"{seconds:.0f}", *dry,
               *more, "--stage"]
    chosen = [name for name in MEASURING if name in options.stage]
    groups = [chosen] if dry and chosen else [[name] for name in chosen]
    check = [*python, "gpu.check", str(out), "--seconds", f"{seconds:.0f}", *dry]
    commands = [("check", check)] if "check" in options.stage else []
    commands += [("+".join(group), [*measure, *group]) for group in groups]
    if "tune" in options.stage:
        commands += _tuner(python, out, options.dry_run)
    if "plots" in options.stage:
        commands.append(("plots", [*python, "gpu.plots", *(str(out / f"{name}.csv") for name in MEASURING)]))
    return commands


def _tuner(python: list[str], out: Path, dry_run: bool) -> list[tuple[str, list[str]]]:
    """The tuner on one shape; a dry run only asks for its help, which imports it."""
    if not TUNER.exists():
        print("tune: this checkout has no rlvr_fast/tuning.py", flush=True)
        return []
    arguments = ["--help"] if dry_run else [*TUNED_SHAPE, "--dtype", "bfloat16", "--output", str(out / "tuned.json")]
    return [("tune", [*python, "rlvr_fast.tuning", *arguments])]


def _run(name: str, command: list[str], environment: dict[str, str], out: Path, seconds: float) -> int:
    """Exit status; output on the screen and in OUTDIR/NAME.log."""
    print(f"=== {name}", flush=True)
    start = time.monotonic()
    with (out / f"{name.replace(' ', '_')}.log").open("w") as log:
        # A session of its own, so that what the stage started can be ended with it.
        process = subprocess.Popen(command, env=environment, cwd=out, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        copying = threading.Thread(target=_copy, args=(process.stdout, log))
        copying.start()
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:.0f} s", flush=True)
            status = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            copying.join()
    print(f"=== {name}: {'done' if not status else 'failed'} after {time.monotonic() - start:.0f} s", flush=True)
    return status


def _copy(lines: Iterable[str], log: IO[str]) -> None:
    for line in lines:
        log.write(line)
        print(line, end="", flush=True)


# -- the machine -------------------------------------------------------------------------------------------------------


def _environment(work: Path, options: argparse.Namespace) -> dict[str, str]:
    """Where Python finds the project, the wheels and bench/."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RLVR_FAST_REPOSITORY": str(REPOSITORY)}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if options.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    path = [str(REPOSITORY / "bench")]
    if options.wheels is not None:
        path.append(str(_unpack_wheels(options.wheels, work / "wheels")))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if not _importable(environment):
        site = stage_site(work / "site")
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *path])
        _build(site, environment, options.dry_run)
    return environment


def _unpack_wheels(wheels: Path, target: Path) -> Path:
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"--wheels must be a folder of wheels, got {wheels}")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
                    "--upgrade", "--target", str(target), *files], check=True)
    return target


def _importable(environment: dict[str, str]) -> bool:
    """Whether ``rlvr_fast``, all of it, comes from this checkout already (an editable installation)."""
    script = ("import importlib.util as u; s = u.find_spec('rlvr_fast');"
              f"print(s.origin if s and all(map(u.find_spec, {list(MAPPED)})) else '')")
    found = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True,
                           check=False).stdout.strip()
    return bool(found) and Path(found).resolve().is_relative_to(REPOSITORY)


def stage_site(site: Path) -> Path:
    """The package as it would be installed, copied from the checkout without its native parts."""
    shutil.rmtree(site, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "rlvr_fast", site / "rlvr_fast", ignore=ignore)
    for package, folder in MAPPED.items():
        shutil.copytree(folder, site.joinpath(*package.split(".")), ignore=ignore)
    print(f"rlvr_fast is staged in {site}", flush=True)
    return site


def _build(site: Path, environment: dict[str, str], dry_run: bool) -> None:
    """The native extensions into ``site``; goes on without them and says so. What is up to date is not built again."""
    if dry_run:
        print("native extensions: not built in a dry run", flush=True)
        return
    built, log = site.parent / "native", site.parent / "build.log"
    command = [sys.executable, "setup.py", "build_ext", "--parallel", "8", "--build-lib", str(built), "--build-temp",
               str(site.parent / "build")]
    with log.open("w") as file:
        try:
            status = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                    check=False, timeout=BUILD_SECONDS).returncode
            words = f"exit status {status}"
        except subprocess.TimeoutExpired:
            words = f"stopped after {BUILD_SECONDS} s"
    extensions = sorted((built / "rlvr_fast").glob("*.so"))
    for path in extensions:
        shutil.copy2(path, site / "rlvr_fast")
    names = ", ".join(path.name.partition(".")[0] for path in extensions) or "none"
    print(f"native extensions: {names} ({words}; {log})", flush=True)


def git_sha() -> str:
    """Of the checkout, with "-dirty" if it differs; GIT_SHA in the environment where there is no repository."""
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None:
        return os.environ.get("GIT_SHA", "unknown")
    return sha + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    sys.exit(main())
