"""The GPU run without a GPU: its statistics, its order of calls, its CSV, and the whole of it on a tiny shape."""

import csv
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
COLUMNS = ["kernel", "provider", "shape", "dtype", "logits", "metric", "p20", "median", "p80", "error", "gpu", "driver",
           "versions", "git_sha", "date", "note"]
PEERS = {"trl", "liger (Triton)", "cut-cross-entropy", "verl", "quack"}
PEER_PACKAGES = {"trl", "liger_kernel", "cut_cross_entropy", "verl", "quack", "transformers"}


@pytest.fixture(autouse=True, scope="module")
def _modules_as_they_were():
    """Peers are imported in part, with stand-ins for their packages: other tests must get the real ones."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PEER_PACKAGES}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in PEER_PACKAGES]:
        del sys.modules[name]
    sys.modules.update(before)
KERNELS = {"token_stats", "gradient_gap hidden", "gradient_gap head", "hidden_grad", "linear_logprob fwd+bwd",
           "token_stats_from_logits", "advantages + loss_weights", "measure_step", "segmented_gradient"}


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield


def rows_in(*paths):
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


# -- time --------------------------------------------------------------------------------------------------------------


class CountingClock:
    """A mark is the number of marks before it; a call between two of them takes what ``cost`` says."""

    def __init__(self):
        self.now, self.waits = 0.0, 0

    def start(self):
        return self.now

    stop = start

    def wait(self):
        self.waits += 1

    def milliseconds(self, start, stop):
        return stop - start


def test_providers_take_turns_and_begin_one_later_each_round():
    from gpu.clock import interleave

    clock, calls = CountingClock(), []

    def provider(name, cost):
        def call(index):
            calls.append((name, index))
            clock.now += cost * (1 + index)
        return call

    times = interleave(clock, {"a": provider("a", 1.0), "b": provider("b", 10.0)}, rounds=4, n_sets=3)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0)]
    assert times == {"a": [1.0, 2.0, 3.0, 1.0], "b": [10.0, 20.0, 30.0, 10.0]}
    assert clock.waits == 4


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_spread_is_the_percentiles(count, generator):
    from gpu.clock import Spread

    values = torch.rand(count, generator=generator, dtype=torch.float64).add(0.1).tolist()
    spread = Spread.of(values)
    assert (spread.p20, spread.median, spread.p80) == pytest.approx(np.percentile(values, (20, 50, 80)))
    rates = spread.reciprocal(6.0)
    assert rates.p20 <= rates.median <= rates.p80
    assert rates.median == pytest.approx(6.0 / spread.median)


def test_events_stand_around_the_call_behind_a_busy_device(monkeypatch):
    from gpu import clock

    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def elapsed_time(self, other):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("busy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    times = clock.interleave(clock.EventClock(), {"a": lambda index: order.append("call")}, rounds=2, n_sets=3)
    assert order == ["busy", "event", "call", "event", "wait"] * 2
    assert times == {"a": [7.0, 7.0]}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_are_absolute_in_nats_and_relative_elsewhere():
    from gpu.suite import Truth, errors, repeatable

    rows = torch.tensor([2, 0])
    truth = {"logp": Truth(rows, torch.tensor([-4.0, -1.0]).double()),
             "hidden_grad": Truth(rows, torch.tensor([[8.0], [2.0]]).double()), "entropy": Truth(rows, torch.zeros(2))}
    result = {"logp": torch.tensor([-1.0, 99.0, -4.5]), "hidden_grad": torch.tensor([[2.0], [99.0], [6.0]]),
              "loss": torch.ones(())}
    assert errors(result, truth) == {"logp": 0.5, "hidden_grad": 0.25}
    result["logp"][0] = math.nan
    assert math.isnan(errors(result, truth)["logp"])
    assert repeatable({"x": rows}, {"x": rows.clone()})
    assert not repeatable({"x": rows}, {"x": rows + 1})


def test_a_nan_of_any_input_set_is_the_worst_error():
    from gpu.measure import prepare
    from gpu.suite import Provider, Truth

    truth = {"logp": Truth(torch.tensor([0]), torch.zeros(1).double())}
    for order in ([0.1, math.nan, 0.2], [math.nan, 0.1, 0.2]):
        known = prepare(Provider("p", lambda x: {"logp": torch.tensor([x])}), order, [truth] * 3, torch.device("cpu"))
        assert math.isnan(known.errors["logp"])
    assert known.extra_bytes is None


def test_weight_gradient_in_float64_is_autograds():
    """The sampled entries, sampled tokens among them, against autograd in float64."""
    from gpu import exact
    from gpu.inputs import draw

    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)).double() / 3
    inputs = draw(weight, 64, "peaked", 1)
    truth = exact.logprob_gradients(inputs)["weight_grad"]
    leaf = weight.clone().requires_grad_()
    logp = torch.log_softmax(inputs.hidden.double() @ leaf.T, 1).gather(1, inputs.tokens[:, None]).squeeze(1)
    gradient, = torch.autograd.grad(logp, leaf, inputs.coefficients.double())
    assert set(truth.rows.tolist()) & set(inputs.tokens.tolist())
    torch.testing.assert_close(truth.value, gradient[truth.rows], rtol=1e-10, atol=1e-12)


def test_the_gap_of_a_gram_matrix_is_the_references():
    from gpu import exact

    from rlvr_fast import reference

    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    correct = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()
    found = exact._gap_of_gram(gradients @ gradients.T, correct)
    assert found.item() == pytest.approx(reference.gap_norm_sq(gradients[correct], gradients[~correct]).item())


@pytest.mark.parametrize(("total", "count"), [(1, 4), (5, 9), (8192 * 4096, 128)])
def test_a_sample_reaches_both_ends_and_no_further(total, count):
    from gpu.exact import sample

    rows = sample(total, count, torch.device("cpu"))
    assert rows[0] == 0
    assert rows[-1] == total - 1
    assert len(rows.unique()) == min(count, total)


@pytest.mark.parametrize(("logits", "least", "most"), [("peaked", 0.03, 0.9995), ("random", 0.0, 0.3)])
def test_logits_are_as_peaked_as_they_say(logits, least, most):
    """At V = 300: the target's probability without and with the lean towards its row."""
    from gpu.inputs import draw

    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(1)) / 16
    inputs = draw(weight, 640, logits, 0)
    p = torch.softmax(inputs.hidden @ weight.T, 1).gather(1, inputs.tokens[:, None])
    assert least <= p.quantile(0.05) <= p.quantile(0.95) <= most
    assert (p.median() > 0.5) == (logits == "peaked")
    assert not torch.equal(inputs.hidden, draw(weight, 640, logits, 1).hidden)


# -- one suite ---------------------------------------------------------------------------------------------------------


def test_what_fails_is_a_row_and_the_others_are_measured(tmp_path):
    from gpu.clock import HostClock
    from gpu.measure import measure
    from gpu.suite import Provider, Suite, Truth
    from gpu.table import Case, Table

    def answer(inputs):
        return {"logp": inputs + 1}

    def broken(inputs):
        raise RuntimeError("no such\nkernel")

    providers = (Provider("floor", lambda inputs: {}, "floor", work=2e9), Provider("rlvr_fast x", answer, "ours"),
                 Provider("slow", broken), Provider("gone", answer, missing="not installed"),
                 Provider("peer", answer, lacks="entropy"))
    suite = Suite("toy", providers, lambda inputs: {"logp": Truth(torch.tensor([1]), torch.tensor([3.0]).double())},
                  lambda inputs: 1e9)
    table = Table(tmp_path / "toy.csv", torch.device("cpu"), "abc")
    case = Case("toy", "2", "float32", "none")
    measure(suite, case, [torch.tensor([1.0, 2.0])] * 3, table, HostClock(), torch.device("cpu"), 3)
    rows = rows_in(table.path)
    notes = {row["provider"]: row["note"] for row in rows if row["metric"] == "milliseconds"}
    assert notes == {"floor": "", "rlvr_fast x": "", "slow": "failed: RuntimeError: no such kernel",
                     "gone": "not installed", "peer": "lacks entropy"}
    figures = {(row["provider"], row["metric"]): row for row in rows if row["median"]}
    assert {provider for provider, _ in figures} == {"floor", "rlvr_fast x", "peer"}
    assert figures["peer", "milliseconds"]["error"] == "0"
    assert figures["rlvr_fast x", "x best peer"]["note"] == "best peer: peer"
    assert float(figures["peer", "x best peer"]["median"]) == 1.0
    milliseconds, rate = (float(figures["peer", metric]["median"]) for metric in ("milliseconds", "TFLOP/s"))
    assert rate == pytest.approx(1e-9 * 1e9 / milliseconds, rel=1e-4)
    assert ("floor", "share of floor") not in figures
    assert all(row["git_sha"] == "abc" for row in rows)


def test_floors_stay_when_providers_are_left_out():
    from gpu.suite import Provider, Suite

    names = ("torch floor", "torch eager", "torch.compile", "trl")
    providers = [Provider(name, dict, "floor" if "floor" in name else "peer") for name in names]
    suite = Suite("toy", tuple(providers), dict, float).without(("torch.c", "trl"))
    assert [provider.name for provider in suite.providers] == ["torch floor", "torch eager"]


def test_a_call_that_waits_is_told_from_one_that_does_not(monkeypatch):
    from gpu.host_waits import _without_wait

    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(inputs):
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    device = torch.device("cuda")
    assert _without_wait(waits, None, device) == (0.0, "called a synchronizing CUDA operation")
    assert _without_wait(lambda inputs: None, None, device) == (1.0, "")
    assert modes == ["error", "default"] * 2
    assert _without_wait(waits, None, torch.device("cpu"))[0] is None


# -- the checks --------------------------------------------------------------------------------------------------------


def test_a_check_passes_fails_or_says_why_it_did_not_run():
    from gpu.check import Check, checks, gpu_tests, run

    def python(code, seconds=None, left=20):
        return run(Check("c", [sys.executable, "-c", code], seconds), left)

    assert python("pass") == (True, "passed")
    assert python("raise SystemExit(9)") == (False, "failed (exit status 9)")
    assert python("import time; time.sleep(60)", seconds=1) == (False, "failed (not finished after 1 s)")
    assert python("import time; time.sleep(60)", left=1) == (False, "failed (not finished after 1 s)")
    assert run(Check("c", ["no such program"], 1, "no checker"), 1) == (True, "not run (no checker)")
    *others, tests = checks(dry_run=False)
    assert tests.seconds is None
    assert sum(check.seconds for check in others) <= 240
    assert {"test_token_stats.py", "test_gap.py"} <= {path.name for path in gpu_tests()}


@pytest.mark.parametrize(("logp", "fine"), [(-1.0, True), (-1.001, False), (math.nan, False)])
def test_tiny_shapes_pass_within_the_limits_only(capsys, logp, fine):
    from gpu.suite import Truth
    from gpu.tiny import compare

    truth = {"logp": Truth(torch.tensor([0]), torch.tensor([-1.0]).double())}
    assert compare("x", {"logp": torch.tensor([logp])}, truth) is fine
    assert ("above the limit" in capsys.readouterr().out) is not fine
    assert not compare("nothing checked", {"loss": torch.tensor([logp])}, truth)


# -- the dry run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All measuring stages on 64 tokens of a vocabulary of 40, in this process; Triton's interpreter in one of them."""
    from gpu import stages

    out = tmp_path_factory.mktemp("dry")
    options = ["--out", str(out), "--dry-run", "--logits", "peaked", "--rounds", "1", "--stage"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # compiling takes longer than everything else here
        assert stages.main([*options, "ceilings", "statistics", "layers"]) == 0
        assert stages.main([*options, "gap", "gradient", "rows", "--without", "rlvr_fast triton"]) == 0
    return rows_in(*(out / f"{name}.csv" for name in stages.STAGES))


@pytest.mark.interpreter
def test_every_kernel_is_asked_of_us_and_of_peers(dry):
    assert list(dry[0]) == COLUMNS
    assert {row["kernel"] for row in dry} == KERNELS | {"ceiling product", "ceiling copy"}
    for kernel in KERNELS:
        measured = {row["provider"] for row in dry if row["kernel"] == kernel and row["median"]}
        assert any(name.startswith("rlvr_fast") for name in measured)
        assert any(name.startswith(("torch", "autograd")) for name in measured)
        assert measured & {"bf16 product 64^3", "device copy"}


@pytest.mark.interpreter
def test_no_provider_is_dropped_without_a_reason(dry):
    listed = {row["provider"] for row in dry if row["kernel"] == "token_stats"}
    assert listed >= PEERS | {"rlvr_fast triton", "rlvr_fast native", "rlvr_fast rows after library product",
                              "torch eager", "torch.compile", "torch fp32 chunks", "torch fp32 chunks compiled"}
    missing = [row for row in dry if row["metric"] == "milliseconds" and not row["median"]]
    assert all(row["note"] for row in missing)
    assert "TORCH_COMPILE_DISABLE" in next(row["note"] for row in missing if row["provider"] == "torch.compile")
    assert not [row["note"] for row in missing if row["note"].startswith("failed")]


@pytest.mark.interpreter
def test_times_are_ordered_and_errors_beside_them_small(dry):
    """Log-probs from bf16 logits err by 1e-2, gradients rounded to bf16 by 2^-9 of the largest, a wrong formula by 0.1
    and more."""
    times = [row for row in dry if row["metric"] == "milliseconds" and row["median"]]
    assert times
    for row in times:
        assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
        floor = row["provider"].startswith(("bf16", "device", "library", "rlvr_fast token_stats"))
        assert floor if not row["error"] else float(row["error"]) < 0.03, row
        if row["provider"].startswith("rlvr_fast") and row["error"] and row["kernel"] in ("token_stats",
                                                                                         "gradient_gap hidden"):
            assert float(row["error"]) < 1e-5


@pytest.mark.interpreter
def test_ours_repeat_bit_for_bit(dry):
    flags = [row["median"] for row in dry if row["metric"] == "bitwise repeatable" and "rlvr_fast" in row["provider"]]
    assert flags
    assert set(flags) == {"1"}


@pytest.mark.interpreter
def test_a_dry_run_says_so_in_every_row(dry):
    for row in dry:
        assert "dry run" in row["gpu"]
        assert row["driver"] == "none"
        assert "torch " in row["versions"]
        assert row["date"][:2] == "20"


def test_what_the_time_does_not_allow_is_said(tmp_path):
    from gpu import stages

    assert stages.main(["--out", str(tmp_path), "--dry-run", "--stage", "gap", "--seconds", "0"]) == 0
    rows = rows_in(tmp_path / "gap.csv")
    assert [(row["kernel"], row["logits"]) for row in rows] == [
        (f"gradient_gap {level}", logits) for level in ("hidden", "head") for logits in ("peaked", "random")]
    assert {row["note"] for row in rows} == {"not measured: out of time"}


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--heads", "tiny", "--tokens", "63"], "multiples of 64, got \\[63\\]"), (["--tokens", "64"], "needs --heads"),
    (["--rounds", "0"], "at least 1, got 0"), (["--stage", "all"], "invalid choice: 'all'")])
def test_bad_options_are_refused(tmp_path, capsys, arguments, complaint):
    from gpu import stages

    with pytest.raises(SystemExit, match="2"):
        stages.main(["--out", str(tmp_path), "--dry-run", *arguments])
    assert re.search(complaint, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_script_runs_its_stages_and_ends_with_the_targets(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--dry-run", "--stage", "ceilings", "plots", "--rounds", "2"]
    command = ["bash", str(BENCH / "gpu.sh"), str(tmp_path), *options]
    result = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row["metric"] for row in rows_in(tmp_path / "ceilings.csv")} >= {"milliseconds", "TFLOP/s", "TB/s"}
    assert (tmp_path / "ceiling_product.png").read_bytes().startswith(b"\x89PNG")
    targets = (tmp_path / "targets.md").read_text()
    assert targets in result.stdout
    verdicts = {line.split("|")[4].strip() for line in targets.splitlines() if line.startswith("| ")}
    assert verdicts == {"verdict", "---", "not measured"}


def test_a_gpu_gives_every_stage_a_process_of_its_own(tmp_path):
    from gpu import launch

    def stages_of(*arguments):
        options, more = launch._options([str(tmp_path), "--stage", "rows", "gap", *arguments])
        return [(name, command[command.index("--out") + 2:]) for name, command in
                launch._commands(options, tmp_path, more, 400.0)]

    assert [name for name, _ in stages_of()] == ["gap", "rows"]
    (name, command), = stages_of("--dry-run", "--rounds", "3")
    assert name == "gap+rows"
    assert command[2:] == ["--seconds", "400", "--dry-run", "--rounds", "3", "--stage", "gap", "rows"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path):
    from gpu import launch

    script = ("import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
              "print(child.pid, flush=True); time.sleep(600)")
    assert launch._run("hangs", [sys.executable, "-c", script], dict(os.environ), tmp_path, 1.0) == 124
    child = Path(f"/proc/{int((tmp_path / 'hangs.log').read_text())}/stat")
    end = time.monotonic() + 10
    while runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(child)


def runs(stat):
    """Whether a process is there and no zombie that its new parent has yet to notice."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_staged_package_is_the_installed_one(tmp_path):
    from gpu import launch

    site = launch.stage_site(tmp_path / "site")
    files = {path.relative_to(site).as_posix() for path in site.rglob("*")}
    assert {"rlvr_fast/__init__.py", "rlvr_fast/backends/torch_backend.py", "rlvr_fast/kernels/config.py",
            "rlvr_fast/bench/workload.py"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc"))]


# -- from the CSV alone ------------------------------------------------------------------------------------------------


def figures(**medians):
    from gpu import targets

    rows = [{"kernel": "token_stats", "provider": provider, "shape": targets.SHAPE, "logits": logits, "metric": metric,
             "median": str(value)} for (provider, logits, metric), value in medians["medians"].items()]
    return {target.text: target.line(targets.figures_of(rows)) for target in targets.targets()}


def test_targets_take_the_worst_of_the_logits():
    ours = "rlvr_fast triton"
    lines = figures(medians={
        (ours, "peaked", "share of floor"): 0.87, (ours, "random", "share of floor"): 0.80,
        (ours, "peaked", "milliseconds"): 10, ("verl", "peaked", "milliseconds"): 13,
        (ours, "random", "milliseconds"): 10, ("verl", "random", "milliseconds"): 30,
        ("cut-cross-entropy", "random", "milliseconds"): 30, (ours, "peaked", "extra GB"): 0.1,
        (ours, "peaked", "error of logp"): 3e-6, ("torch fp32 chunks", "peaked", "error of logp"): 1e-6,
        (ours, "peaked", "bitwise repeatable"): 1})
    assert lines["token_stats, share of the product's rate"][2:] == ("80 %", "first goal reached")
    assert lines["token_stats, times as fast as verl"][2:] == ("1.3x", "not reached")
    assert lines["token_stats, times as fast as cut-cross-entropy"][2:] == ("3x", "reached")
    assert lines["token_stats, times as fast as liger (Triton)"][2:] == ("", "not measured")
    assert lines["token_stats, extra memory"][2:] == ("0.1 GB", "reached")
    assert lines["token_stats, error of logp over torch fp32 chunks"][2:] == ("3x", "not reached")
    assert lines["bitwise repeatable, all our calls"][2:] == ("100 %", "reached")
    assert lines["gap at level hidden, over token_stats"][3] == "not measured"


def test_figures_leave_out_what_was_not_measured():
    from gpu.plots import label, panels_of, role

    row = dict.fromkeys(COLUMNS, "") | {"kernel": "k", "shape": "s", "logits": "peaked", "metric": "milliseconds"}
    rows = [row | {"provider": "a", "median": "2", "error": "1e-7"}, row | {"provider": "b", "note": "gone"},
            row | {"provider": "a", "metric": "share of floor", "median": "0.5"}]
    panels = panels_of(rows)
    assert [bar["provider"] for bar in panels["k"]["s", "peaked"]] == ["a"]
    assert label(panels["k"]["s", "peaked"][0]) == "  2 ms, 50 %, err 1e-07"
    assert [role(name) for name in ("rlvr_fast triton", "rlvr_fast token_stats", "trl", "device copy")] == [
        "ours", "floor", "peer", "floor"]


def test_a_peer_that_is_not_installed_is_named():
    from gpu.peers import stand_in

    with pytest.raises(ImportError, match="no package 'no_such_package'"):
        stand_in("no_such_package")
    assert "no_such_package" not in sys.modules


def test_fetch_peers_refuses_what_it_does_not_know(tmp_path):
    command = ["bash", str(BENCH / "fetch_peers.sh"), str(tmp_path), "--all"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "unknown option --all" in result.stderr
