"""``rlvr-fast profile``: shapes, work and floors by hand, a small real run, and the command as a user meets it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import rlvr_fast as rf
from rlvr_fast import cli
from rlvr_fast.profile import MODELS, Shape, machine, profile
from rlvr_fast.profile.report import Growth, ProfileReport, StageResult
from rlvr_fast.profile.stages import Inputs, all_stages

CPU = torch.device("cpu")
SMALL = Shape(prompts=4, group_size=4, length=4, vocabulary_size=128, hidden_size=16)
STAGES = ["token_stats", "gradient_gap logits", "gradient_gap hidden", "gradient_gap head", "token_stats hidden_grad",
          "linear_logprob fwd+bwd", "advantages + weights", "measure_step"]


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_sizes_of_a_shape():
    shape = Shape(64, 8, 512, 152064, 3584)
    assert shape.n_responses == 512
    assert shape.n_tokens == 262144
    assert shape.product_flops == 2 * 262144 * 152064 * 3584


def test_half_an_axis_leaves_the_others():
    assert SMALL.halved("N") == replace(SMALL, length=2)
    assert SMALL.halved("V") == replace(SMALL, vocabulary_size=64)
    assert SMALL.halved("G") == replace(SMALL, group_size=2, prompts=8)
    assert SMALL.halved("G").n_tokens == SMALL.n_tokens
    assert replace(SMALL, length=3).halved("N") is None
    assert replace(SMALL, group_size=1).halved("G") is None


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen2.5-7b", "qwen2.5-72b"])
@pytest.mark.parametrize("budget", [1e8, 1e10, 1e12, 1e15])
def test_a_fitted_shape_meets_the_budget_and_uses_it(model, budget):
    asked = Shape(64, 8, 512, MODELS[model].vocabulary_size, MODELS[model].hidden_size)
    fitted = asked.fitted(budget)
    if asked.product_flops <= budget:
        assert fitted == asked
        return
    assert budget / 3 < fitted.product_flops <= budget
    assert fitted.group_size == 8
    assert all(part <= whole for part, whole in zip(vars(fitted).values(), vars(asked).values(), strict=True))
    assert fitted.halved("N")
    assert fitted.halved("V")


def test_fitting_gives_up_tokens_before_the_head():
    asked = Shape(64, 8, 512, 1000, 100)
    assert asked.fitted(asked.product_flops / 8) == replace(asked, prompts=8)
    fitted = asked.fitted(asked.product_flops / 128)
    assert (fitted.prompts, fitted.length, fitted.vocabulary_size) == (2, 128, 1000)


def test_a_shape_below_the_floors_is_not_enlarged():
    tiny = Shape(1, 2, 3, 5, 7)
    assert tiny.fitted(1.0) == tiny


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_bad_size_is_named(size):
    with pytest.raises((ValueError, TypeError), match=r"^group_size must be"):
        replace(SMALL, group_size=size)


# Layers, intermediate size, key-value width, query width (None: D), tied head, biases of q/k/v, norms per layer in
# units of D, and weights of query and key norms per layer: from the models' config.json.
ARCHITECTURES = {
    "smollm2-135m": (30, 1536, 192, None, True, False, 2, 0), "smollm2-1.7b": (24, 8192, 2048, None, True, False, 2, 0),
    "qwen2.5-0.5b": (24, 4864, 128, None, True, True, 2, 0), "qwen2.5-1.5b": (28, 8960, 256, None, True, True, 2, 0),
    "qwen2.5-3b": (36, 11008, 256, None, True, True, 2, 0), "qwen2.5-7b": (28, 18944, 512, None, False, True, 2, 0),
    "qwen2.5-14b": (48, 13824, 1024, None, False, True, 2, 0),
    "qwen2.5-32b": (64, 27648, 1024, None, False, True, 2, 0),
    "qwen2.5-72b": (80, 29568, 1024, None, False, True, 2, 0),
    "qwen3-8b": (36, 12288, 1024, None, False, False, 2, 256),
    "llama-3.2-1b": (16, 8192, 512, None, True, False, 2, 0), "llama-3-8b": (32, 14336, 1024, None, False, False, 2, 0),
    "llama-3-70b": (80, 28672, 1024, None, False, False, 2, 0), "gemma-2-2b": (26, 9216, 1024, 2048, True, False, 4, 0),
    "gemma-2-9b": (42, 14336, 2048, 4096, True, False, 4, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_follow_from_the_architecture(name):
    """Embedding and head, attention, gated MLP, norms: counted from the config, equal to the model card's number."""
    layers, intermediate, kv, query, tied, biased, norms, qk_norm = ARCHITECTURES[name]
    d, v = MODELS[name].hidden_size, MODELS[name].vocabulary_size
    query = query or d
    attention = 2 * d * query + 2 * d * kv + (query + 2 * kv if biased else 0) + qk_norm
    assert MODELS[name].parameters == layers * (attention + 3 * d * intermediate + norms * d) + d + v * d * (2 - tied)
    assert (MODELS[name].softcap == 30.0) == name.startswith("gemma-2")


# -- work and floors --------------------------------------------------------------------------------------------------


def test_required_work_by_hand():
    """N = 64, R = 16, V = 128, D = 16, float32: one product is 262,144 FLOPs, the operands 4·16·(64 + 128) bytes."""
    stages = {stage.name: stage for stage in all_stages(("logits", "hidden", "head"), None, "torch")}
    assert list(stages) == STAGES
    products = {name: stage.flops(SMALL) / 262144 for name, stage in stages.items()}
    assert list(products.values()) == [1, 1, 1, 2, 2, 3, 0, 0]
    operands = 4 * 16 * 192
    assert stages["token_stats"].bytes(SMALL, 4) == operands + 20 * 64
    assert stages["gradient_gap logits"].bytes(SMALL, 4) == operands + 20 * 64 + 4 * 16 * 128
    assert stages["gradient_gap hidden"].bytes(SMALL, 2) == operands / 2 + 20 * 64 + 4 * 16 * 16
    assert stages["linear_logprob fwd+bwd"].bytes(SMALL, 4) == 2 * operands + 8 * 64
    assert stages["measure_step"].bytes(SMALL, 4) == 12 * 64 + 24 * 16


def test_stages_call_the_public_functions_with_the_heads_options():
    inputs = Inputs.draw(SMALL, torch.float32, CPU)
    batch = inputs.batch
    stages = {stage.name: stage for stage in all_stages(("hidden",), 5.0, "torch")}
    expected = rf.token_stats(batch.hidden, batch.weight, batch.rollouts.tokens, softcap=5.0, hidden_grad=True,
                              backend="torch")
    assert torch.equal(stages["token_stats"].run(inputs).logp, expected.logp)
    assert torch.equal(stages["token_stats hidden_grad"].run(inputs).hidden_grad, expected.hidden_grad)
    gap = rf.gradient_gap(batch.hidden, batch.weight, batch.rollouts, softcap=5.0, backend="torch")
    assert torch.equal(stages["gradient_gap hidden"].run(inputs).norm_sq, gap.norm_sq)
    grad_hidden, grad_weight = stages["linear_logprob fwd+bwd"].run(inputs)
    torch.testing.assert_close(grad_hidden, expected.hidden_grad, rtol=1e-4, atol=1e-5)  # float32 sums over V and N
    assert grad_weight.shape == batch.weight.shape
    step = stages["measure_step"].run(inputs)
    assert step.curvature.isfinite().any()
    assert not step.in_sample


def made_up_report(measured=SMALL, **changes) -> ProfileReport:
    """1 TFLOP/s and 100 GB/s; a stage of 2e9 FLOPs and 1e6 bytes in 4 ms, one of 1e6 bytes in 0.1 ms."""
    work = SMALL.product_flops / measured.product_flops
    stages = (StageResult("token_stats", 4e-3, 3e-3, 5e-3, 0.5, 2e9, 1e6, 2e9 * work, 1e6 * work, 1 << 20),
              StageResult("measure_step", 1e-4, 1e-4, 1e-4, 1e-3, 0.0, 1e6, 0.0, 3e6, None))
    values = {"requested": SMALL, "measured": measured, "stages": stages,
              "growth": tuple(Growth("V", stage.name, 1e-3, 2e-3, 2.0) for stage in stages),
              "gemm_flops_per_second": 1e12, "copy_bytes_per_second": 1e11, "parameters": 10**9, "softcap": None,
              "device_name": "a chip", "device": "cpu", "dtype": "float32", "backend": "torch", "repeats": 3,
              "seconds_budget": 60.0, "seconds_taken": 1.0}
    return ProfileReport(**values | changes)


def test_the_slower_floor_binds():
    report = made_up_report()
    assert report.floor(report.stages[0]) == (2e-3, "FLOPs")
    assert report.floor(report.stages[1]) == (pytest.approx(1e-5), "bytes")
    rows = {row["name"]: row for row in report.to_json()["stages"]}
    assert rows["token_stats"]["share_of_floor"] == rows["token_stats"]["share_of_gemm"] == pytest.approx(0.5)
    assert rows["token_stats"]["flops_per_second"] == pytest.approx(5e11)
    assert rows["measure_step"]["share_of_gemm"] is None
    assert rows["measure_step"]["share_of_floor"] == pytest.approx(0.1)


def test_the_share_of_a_step_by_hand():
    """N = 64: 8·1e9·64 FLOPs at 1 TFLOP/s are 0.512 s, so 4 ms are 1/128 of a step."""
    report = made_up_report()
    assert report.step_seconds(8) == pytest.approx(0.512)
    shares = report.to_json()["stages"][0]["share_of_step_at_most"]
    assert shares["with recompute"] == pytest.approx(1 / 128)
    assert shares["without recompute"] == pytest.approx(1 / 96)
    assert "0.78 %" in repr(report)
    assert "give --parameters" in repr(made_up_report(parameters=None))


def test_a_scaled_run_projects_by_the_work_and_says_so():
    report = made_up_report(replace(SMALL, vocabulary_size=64))
    assert report.scaled
    assert report.stages[0].requested_seconds() == pytest.approx(8e-3)
    assert report.stages[1].requested_seconds() == pytest.approx(3e-4)
    assert report.to_json()["stages"][0]["requested_seconds_is"] == "projected"
    for text in ("Scaled down by 2x to fit 60 s", "Projected from the smaller shape", "measured:"):
        assert text in repr(report)
    assert "Scaled" not in repr(made_up_report())
    assert "Projected" not in repr(made_up_report())


def test_an_axis_that_could_not_be_halved_is_named():
    assert " ".join(repr(made_up_report()).split()).count("not measured: an odd size cannot be halved") == 2


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    seen = []
    report = profile(SMALL, parameters=1000, repeats=2, backend="torch", trace=trace,
                     progress=lambda done, total, text: seen.append((done, total, text)))
    return report, trace, seen


def test_every_stage_is_measured(finished):
    report = finished[0]
    assert [stage.name for stage in report.stages] == STAGES
    assert report.measured == report.requested == SMALL
    for stage in report.stages:
        assert 0 < stage.least_seconds <= stage.seconds <= stage.most_seconds
        assert stage.first_seconds > 0
    assert report.gemm_flops_per_second > 1e6
    assert report.copy_bytes_per_second > 1e6
    assert {(row.axis, row.name) for row in report.growth} == {(axis, name) for axis in "NVG" for name in STAGES}
    assert all(0 < row.ratio < math.inf for row in report.growth)
    assert finished[2][-1] == (2, 2, "done")


def test_the_json_is_complete_and_holds_no_nan(finished):
    content = json.loads(json.dumps(finished[0].to_json(), allow_nan=False))
    assert content["measured"]["n_tokens"] == 64
    assert len(content["stages"]) == len(STAGES)
    assert {"seconds", "bound_by", "share_of_floor", "peak_extra_bytes", "requested_seconds_is"} <= set(
        content["stages"][0])


def test_the_trace_names_every_stage(finished):
    events = json.loads(finished[1].read_text())["traceEvents"]
    assert set(STAGES) <= {event.get("name") for event in events}


def test_a_budget_scales_the_shape_down():
    asked = Shape(64, 8, 512, 20000, 64)
    report = profile(asked, repeats=2, seconds=1.0, levels=("hidden",), backend="torch")
    assert report.scaled
    assert report.requested == asked
    assert report.measured.product_flops < asked.product_flops
    assert report.repeats == 2


def test_memory_of_a_call():
    if machine.peak_extra_bytes(lambda: None, CPU) is None:
        pytest.skip("the high-water mark of resident memory cannot be reset here")
    size = 256 << 20
    found = machine.peak_extra_bytes(lambda: torch.ones(size // 4), CPU)
    assert 0.9 * size < found < 1.2 * size


@pytest.mark.parametrize(("change", "message"), [
    ({"levels": ("model",)}, "levels must be one of"),
    ({"repeats": 1}, "repeats must be at least 2"),
    ({"seconds": 0}, "seconds must be positive"),
    ({"dtype": torch.float64}, "dtype must be"),
    ({"softcap": -1.0}, "softcap must be positive"),
    ({"backend": "fast"}, "backend must be one of"),
])
def test_bad_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        profile(SMALL, **change)


# -- the command ------------------------------------------------------------------------------------------------------

TINY = ["profile", "--hidden-size", "16", "--vocabulary-size", "128", "--prompts", "2", "--group-size", "2", "--length",
        "4", "--repeats", "2", "--device", "cpu", "--backend", "torch"]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_json_on_stdout_is_nothing_but_json():
    done = invoke(*TINY, "--json", "-")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["requested"]["hidden_size"] == 16
    assert content["parameters"] is None


def test_tables_and_files(tmp_path):
    done = invoke(*TINY, "--parameters", "1e6", "--json", str(tmp_path / "p.json"), "--trace", str(tmp_path / "t.json"),
                  "--levels", "hidden")
    assert done.exit_code == 0, done.output
    assert "gradient_gap hidden" in done.stdout
    assert "gradient_gap head" not in done.stdout
    assert json.loads((tmp_path / "p.json").read_text())["parameters"] == 10**6
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_the_models_can_be_listed():
    done = invoke("profile", "--model", "list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in MODELS)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give --model, or both"),
    (["--hidden-size", "8"], "give --model, or both"),
    (["--model", "gpt-9"], "--model must be one of"),
    (["--model", "qwen2.5-7b", "--hidden-size", "8"], "not both"),
    ([*TINY[1:], "--dtype", "float64"], "dtype must be auto"),
    ([*TINY[1:], "--levels", "model"], "levels must be one of"),
    ([*TINY[1:], "--prompts", "0"], "prompts must be at least 1"),
    ([*TINY[1:], "--device", "abacus"], "--device must be"),
    ([*TINY[1:], "--device", "cuda:99"], "--device is cuda:99"),
    ([*TINY[1:], "--parameters", "0"], "--parameters must be positive"),
    ([*TINY[1:], "--json", "/nowhere/at/all.json"], "--json must name a file in an existing folder"),
    ([*TINY[1:], "--backend", "fast"], "backend must be one of"),
])
def test_bad_usage_exits_with_2_and_a_message(arguments, message):
    done = invoke("profile", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_the_help_does_not_load_the_profiler():
    program = ("import sys\nfrom rlvr_fast import cli\nfrom typer.testing import CliRunner\n"
               "done = CliRunner().invoke(cli.app, ['profile', '--help'])\n"
               "assert done.exit_code == 0 and '--group-size' in done.stdout, done.output\n"
               "assert 'rlvr_fast.profile' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
