"""Tables of measured tiles: which tile is looked up, what may enter a table, and how a measurement chooses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast import tuning
from rlvr_fast.kernels import config
from rlvr_fast.kernels.config import HeadTile, TunedTile
from rlvr_fast.synthetic import SyntheticBatch
from rlvr_fast.tuned_tiles import merge_tiles, read_tiles

CPU, FP32 = torch.device("cpu"), torch.float32
DEFAULT = config.HEAD_TILES["interpreter", 4]
OTHER = replace(DEFAULT, rows=32)
THIRD = replace(DEFAULT, columns=64)


def entry(shape=(1024, 4096, 256), tile=OTHER, chip="interpreter", itemsize=4, **changes) -> TunedTile:
    return TunedTile(**{"chip": chip, "architecture": "interpreter", "bytes_per_element": itemsize,
                        "n_tokens": shape[0], "vocabulary_size": shape[1], "hidden_size": shape[2], "tile": tile,
                        "milliseconds": 1.5, "default_milliseconds": 2.0, "operations": ("token_stats",),
                        "date": "2025-01-01", "versions": {"torch": "2.11"}} | changes)


@pytest.fixture(autouse=True)
def _table():
    """Whatever a test loads, the next one starts with the shipped table."""
    yield
    rf.load_tiles(None)


def tile_for(*shape: int, dtype=FP32, softcap=None) -> HeadTile:
    return config.head_tile(CPU, dtype, softcap, shape)


# -- looking up -------------------------------------------------------------------------------------------------------


def test_without_measurements_the_default_serves_every_shape():
    config.use_tiles(())
    assert tile_for(1024, 4096, 256) == DEFAULT
    assert tile_for(0, 1, 1) == DEFAULT


def test_a_measurement_serves_its_neighbourhood_and_nothing_else():
    config.use_tiles([entry()])
    for shape in ((1024, 4096, 256), (256, 4096, 256), (10**6, 4096, 256), (1024, 8192, 128), (1024, 2048, 512)):
        assert tile_for(*shape) == OTHER, shape
    for shape in ((255, 4096, 256), (1024, 8193, 256), (1024, 2047, 256), (1024, 4096, 513), (1024, 4096, 127),
                  (0, 4096, 256)):
        assert tile_for(*shape) == DEFAULT, shape
    assert tile_for(1024, 4096, 256, dtype=torch.bfloat16) == config.HEAD_TILES["interpreter", 2]


def test_another_chip_or_element_size_says_nothing():
    config.use_tiles([entry(chip="NVIDIA H200"), entry(itemsize=2)])
    assert tile_for(1024, 4096, 256) == DEFAULT


def test_the_nearest_measurement_wins_and_the_earlier_one_a_tie():
    config.use_tiles([entry((1024, 4096, 256), OTHER), entry((4096, 4096, 256), THIRD)])
    assert tile_for(1500, 4096, 256) == OTHER
    assert tile_for(3000, 4096, 256) == THIRD
    assert tile_for(2048, 4096, 256) == OTHER
    config.use_tiles([entry(tile=THIRD), entry(tile=OTHER)])
    assert tile_for(1024, 4096, 256) == THIRD


def test_replacing_the_table_forgets_cached_choices():
    config.use_tiles([entry()])
    assert tile_for(1024, 4096, 256) == OTHER
    config.use_tiles([entry(tile=THIRD)])
    assert tile_for(1024, 4096, 256) == THIRD


def test_a_soft_cap_splits_the_measured_tile_too():
    wide = replace(DEFAULT, columns=256, slices=2)
    config.use_tiles([entry(tile=wide)])
    assert tile_for(1024, 4096, 256, softcap=30.0) == replace(wide, slices=4)


@pytest.mark.parametrize(("columns", "slices", "expected"), [(256, 4, 8), (256, 8, 8), (128, 4, 4), (64, 1, 2)])
def test_a_soft_cap_stays_within_eight_slices_of_32_columns(columns, slices, expected):
    assert replace(DEFAULT, columns=columns, slices=slices).with_softcap().slices == expected


def test_only_tile_holds_inside_its_block_even_if_that_fails():
    config.use_tiles([entry()])

    def fail():
        with config.only_tile(THIRD):
            assert tile_for(1024, 4096, 256) == tile_for(1, 1, 1) == THIRD
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tile_for(1024, 4096, 256) == OTHER


def test_the_shipped_table_is_valid():
    """Its entries would pass the same checks as a user's."""
    path = config.files("rlvr_fast.kernels").joinpath("tuned.json")
    assert read_tiles(path) == config.shipped_tiles()


def test_candidates_differ_from_the_default_and_from_one_another():
    for key, candidates in config.HEAD_TILE_CANDIDATES.items():
        assert len({config.HEAD_TILES[key], *candidates}) == len(candidates) + 1
        for index, tile in enumerate(candidates):
            tuning.check_tile(f"candidates[{index}]", tile)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_table_survives_the_file(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    rows = (entry(), entry((64, 64, 64), THIRD))
    merge_tiles(path, rows)
    assert {row.shape: row for row in read_tiles(path)} == {row.shape: row for row in rows}
    assert list(path.parent.iterdir()) == [path]


def test_loading_puts_the_file_to_use_and_none_takes_it_away(tmp_path):
    path = tmp_path / "tiles.json"
    merge_tiles(path, [entry()])
    assert rf.load_tiles(path) == (entry(),)
    assert tile_for(1024, 4096, 256) == OTHER
    assert rf.load_tiles(None) == ()
    assert tile_for(1024, 4096, 256) == DEFAULT


def test_merging_replaces_the_same_shape_and_keeps_the_others(tmp_path):
    path = tmp_path / "tiles.json"
    merge_tiles(path, [entry(), entry((64, 64, 64))])
    merged = merge_tiles(path, [entry(tile=THIRD, milliseconds=0.5)])
    assert merged == read_tiles(path)
    assert {row.shape: row.tile for row in merged} == {(1024, 4096, 256): THIRD, (64, 64, 64): OTHER}


def test_a_failed_write_leaves_the_old_table_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    merge_tiles(path, [entry()])

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        merge_tiles(path, [entry(tile=THIRD)])
    assert read_tiles(path) == (entry(),)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("change", "message"), [
    ({"n_tokens": 0}, "n_tokens of entry 0"),
    ({"hidden_size": 2.5}, "hidden_size of entry 0"),
    ({"milliseconds": -1.0}, "milliseconds of entry 0"),
    ({"chip": 3}, "chip of entry 0"),
    ({"extra": 3}, "entry 0 of"),
    ({"tile": {"rows": 128}}, "tile of entry 0"),
    ({"tile": vars(OTHER) | {"rows": 100}}, r"tile of entry 0 of .*\.rows must be in .* got 100"),
    ({"tile": vars(OTHER) | {"rows": 128.0}}, r"\.rows must be in"),
    ({"tile": vars(OTHER) | {"descriptors": 1}}, r"\.descriptors must be in"),
    ({"tile": vars(OTHER) | {"columns": 16, "slices": 8}}, "8 columns or more per slice"),
])
def test_a_bad_entry_is_refused_and_the_table_in_use_stays(tmp_path, change, message):
    config.use_tiles([entry()])
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": [entry(tile=THIRD).to_json() | change]}))
    with pytest.raises(ValueError, match=message):
        rf.load_tiles(path)
    assert tile_for(1024, 4096, 256) == OTHER


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tiles": 3}', '{"tiles": [7]}'])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        rf.load_tiles(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        rf.load_tiles(tmp_path / "absent.json")


# -- choosing ---------------------------------------------------------------------------------------------------------


def tile_now() -> HeadTile:
    return tile_for(1, 1, 1)


def compare(candidates, milliseconds, wrong=(), broken=()):
    """A measurement with a made-up clock: ``milliseconds[tile]`` per call."""

    def run(_):
        if tile_now() in broken:
            raise RuntimeError("out of resources")
        return [torch.ones(3) + (1e-3 if tile_now() in wrong else 0.0)]

    def clock(call):
        call()
        return milliseconds[tile_now()]

    return tuning.compare_tiles(candidates, [tuning.Operation("token_stats", run, 1e-5)], (1024, 4096, 256), FP32, CPU,
                                clock=clock, repeats=3)


def test_the_fastest_tile_wins_and_carries_its_provenance():
    report = compare([OTHER, THIRD], {DEFAULT: 2.0, OTHER: 1.0, THIRD: 1.5})
    assert report.best.tile == OTHER
    written = report.entry
    assert (written.milliseconds, written.default_milliseconds) == (1.0, 2.0)
    assert (written.chip, written.shape, written.operations) == ("interpreter", (1024, 4096, 256), ("token_stats",))
    assert written.versions["torch"] == torch.__version__
    assert {"triton", "python", "rlvr-fast"} <= set(written.versions)
    assert written.date[:2] == "20"
    config.use_tiles([written])
    assert tile_for(1024, 4096, 256) == OTHER


def test_a_gain_below_two_percent_is_noise():
    report = compare([OTHER], {DEFAULT: 1.0, OTHER: 0.985})
    assert report.best is report.default
    assert report.entry.tile == DEFAULT
    assert compare([OTHER], {DEFAULT: 1.0, OTHER: 0.97}).best.tile == OTHER


def test_wrong_and_failing_tiles_are_rejected_however_fast():
    report = compare([OTHER, THIRD], {DEFAULT: 2.0, OTHER: 0.1, THIRD: 0.1}, wrong=[OTHER], broken=[THIRD])
    assert report.best.tile == DEFAULT
    reasons = {timing.tile: timing.rejected for timing in report.timings}
    assert reasons[DEFAULT] is None
    assert "wrong: token_stats differs" in reasons[OTHER]
    assert "does not run: out of resources" in reasons[THIRD]
    assert "rejected" in repr(report)
    assert "(default, best)" in repr(report)


def test_a_tile_that_gives_nan_is_rejected():
    def run(_):
        return [torch.full((2,), float("nan") if tile_now() == OTHER else 1.0)]

    report = tuning.compare_tiles([OTHER], [tuning.Operation("token_stats", run, 1e-5)], (8, 8, 8), FP32, CPU,
                                  clock=lambda call: 1.0, repeats=3)
    assert report.timings[1].rejected


def test_tiles_take_turns_on_all_input_sets():
    calls = []

    def run(index):
        calls.append((tile_now(), index))
        return [torch.ones(1)]

    tuning.compare_tiles([OTHER], [tuning.Operation("token_stats", run, 1e-5)], (8, 8, 8), FP32, CPU,
                         clock=lambda call: (call(), 1.0)[1], repeats=4)
    assert calls[-8:] == [(tile, index) for index in (0, 1, 2, 0) for tile in (DEFAULT, OTHER)]


def test_the_default_is_measured_once_even_if_it_is_a_candidate():
    report = compare([DEFAULT, OTHER, OTHER], dict.fromkeys((DEFAULT, OTHER), 1.0))
    assert [timing.tile for timing in report.timings] == [DEFAULT, OTHER]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_the_real_operations_run_on_the_tile_and_accept_a_right_one():
    inputs = [SyntheticBatch.draw(vocabulary_size=70, hidden_size=8, n_tokens=20, n_responses=2, group_size=2,
                                  seed=seed) for seed in range(2)]
    operations = tuning.head_operations(inputs)
    report = tuning.compare_tiles([OTHER], operations, (20, 70, 8), FP32, CPU, clock=lambda call: 1.0, repeats=3,
                                  input_sets=2)
    assert report.timings[1].rejected is None
    for operation in operations:  # Triton's blocks are powers of two, so a tile that is used cannot have 24 rows
        with config.only_tile(replace(DEFAULT, rows=24)), pytest.raises(ValueError, match="power of 2"):
            operation.run(0)


def test_measuring_needs_a_gpu():
    with pytest.raises(ValueError, match="tiles are measured on a GPU: device must be a CUDA device, got cpu"):
        rf.tune_head((100, 64), n_tokens=32, device="cpu")
    with pytest.raises(ValueError, match="tiles are measured on a GPU"):
        rf.tune_head(torch.zeros(100, 64), n_tokens=32)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"weight": (100,)}, TypeError, "weight must be"),
    ({"weight": (100, 0)}, ValueError, "D of weight must be at least 1"),
    ({"n_tokens": 0}, ValueError, "n_tokens must be at least 1"),
    ({"n_tokens": 1.5}, TypeError, "n_tokens must be an int"),
    ({"repeats": 2}, ValueError, "repeats must be at least 3"),
    ({"dtype": torch.float64}, TypeError, "dtype must be"),
    ({"weight": torch.zeros(4, 4), "dtype": torch.float16}, TypeError, "dtype must be that of weight"),
])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        rf.tune_head(**{"weight": (100, 64), "n_tokens": 32} | change)


def test_a_candidate_the_kernels_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"candidates\[0\]\.rows must be in"):
        compare([replace(DEFAULT, rows=17)], {DEFAULT: 1.0})


def test_the_command_explains_itself_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        tuning.main(["--hidden-size", "64", "--vocabulary-size", "100"])
    assert stop.value.code == 2
    assert "tiles are measured on a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_real_measurement_writes_a_table_that_loads(tmp_path):
    path = tmp_path / "tiles.json"
    candidate = replace(config.HEAD_TILES[config.architecture(torch.device("cuda")), 2], group=8)
    report = rf.tune_head((4096, 256), n_tokens=512, candidates=[candidate], output=path, repeats=3)
    assert all(timing.rejected is None and timing.milliseconds > 0 for timing in report.timings)
    assert rf.load_tiles(path) == (report.entry,)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_synthetic_batches_are_what_they_say():
    batch = SyntheticBatch.draw(vocabulary_size=500, hidden_size=32, n_tokens=1001, n_responses=12, group_size=4)
    assert batch.hidden.shape == (1001, 32)
    assert batch.rollouts.bounds[-1] == 1001
    for members in batch.rollouts.members:
        assert 0 < batch.rollouts.correct[list(members)].sum() < 4
    mean = 1001 / 12
    assert (batch.rollouts.lengths > mean / 3).all()
    assert (batch.rollouts.lengths < 3 * mean).all()
    p = rf.token_stats(batch.hidden, batch.weight, batch.rollouts.tokens).logp.exp()
    assert p.min() < 0.3 < 0.95 < p.max()
    other = SyntheticBatch.draw(vocabulary_size=500, hidden_size=32, n_tokens=1001, n_responses=12, group_size=4,
                                seed=1)
    assert not torch.equal(batch.hidden, other.hidden)
