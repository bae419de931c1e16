"""Rollout dumps after the fact: what is read, what is refused and in which words, and the figures themselves."""

import gzip
import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from rlvr_fast.analyze import analyze
from rlvr_fast.analyze.files import rollout_files
from rlvr_fast.cli import app

ROWS = [  # two steps; in step 1 "a" is mixed and "b" failed, in step 2 "a" is solved and "b" mixed
    dict(zip(("step", "uid", "score", "response_length"), row, strict=True)) for row in [
        (1, "a", 1, 12), (1, "a", 0, 10), (1, "b", 0, 30), (1, "b", 0, 30),
        (2, "a", 1, 12), (2, "a", 1, 14), (2, "b", 1, 34), (2, "b", 0, 30)]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def dump(tmp_path):
    return write(tmp_path / "rollouts.jsonl", ROWS)


def test_counts_rates_and_lengths(dump):
    found = analyze(dump)
    summary = found["summary"]
    assert (summary["responses"], summary["prompts"], summary["steps"], summary["groups"]) == (8, 2, 2, 4)
    assert (summary["success"], summary["mixed"], summary["solved"], summary["failed"]) == (0.5, 0.5, 0.25, 0.25)
    assert summary["length_difference"] == 3  # +2 in one mixed group, +4 in the other
    assert summary["length_difference_stderr"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert [row["success"] for row in found["steps"]] == [0.25, 0.75]
    assert [row["mixed"] for row in found["steps"]] == [0.5, 0.5]
    assert [row["length_difference"] for row in found["steps"]] == [2, 4]
    assert {row["prompt"]: (row["rollouts"], row["correct"], row["mixed"]) for row in found["prompts"]} == {
        "a": (4, 3, 0.5), "b": (4, 1, 0.5)}
    assert [(row["bin"], row["prompts"]) for row in found["spectrum"]] == [("0.2 to 0.4", 1), ("0.6 to 0.8", 1)]


def test_every_format_says_the_same(dump, tmp_path):
    expected = analyze(dump)
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wt") as file:
        file.write(dump.read_text())
    np.savez(tmp_path / "arrays.npz", **{name: np.array([row[name] for row in ROWS]) for name in ROWS[0]})
    assert analyze(tmp_path / "zipped.jsonl.gz") == expected
    assert analyze(tmp_path / "arrays.npz") == expected


def test_parquet_says_the_same(dump, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rollouts.parquet")
    assert analyze(tmp_path / "rollouts.parquet") == analyze(dump)
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "rollouts.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken\.parquet: no readable Parquet"):
        analyze(tmp_path / "broken.parquet")


def test_a_folder_is_read_in_the_order_of_its_numbers(dump, tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    for name in ("10.jsonl", "2.jsonl", "1.jsonl", "notes.txt"):
        (folder / name).write_text("")
    assert [file.name for file in rollout_files(folder)] == ["1.jsonl", "2.jsonl", "10.jsonl"]
    (folder / "10.jsonl").unlink()
    write(folder / "1.jsonl", ROWS[:4])
    write(folder / "2.jsonl", ROWS[4:])
    assert analyze(folder) == analyze(dump)


def test_texts_and_tokens_are_measured_where_no_length_is_given(tmp_path):
    chat = [{"role": "user", "content": "?"}]
    texts = [{"prompt": chat, "reward": i % 2, "completion": "ab" * (i + 1)} for i in range(4)]
    found = analyze(write(tmp_path / "texts.jsonl", texts))["summary"]
    assert (found["length_unit"], found["length_difference"], found["prompts"]) == ("characters", 2, 1)
    tokens = [{"prompt": "?", "reward": i % 2, "completion_ids": [5] * (i + 1)} for i in range(4)]
    found = analyze(write(tmp_path / "tokens.jsonl", tokens))["summary"]
    assert (found["length_unit"], found["length_difference"]) == ("tokens", 1)


def test_the_effect_of_a_step_is_measured_where_log_probs_allow(tmp_path):
    """Two responses, right 1.5 times and wrong 0.5 times as likely: the log-odds gain by log 3."""
    rows = [{"uid": 0, "reward": 1, "logp": [-1.0, -1.0], "logp_after": [-1.0, -1.0 + math.log(1.5)]},
            {"uid": 0, "reward": 0, "logp": [-2.0], "logp_after": [-2.0 + math.log(0.5)]}]
    step, = analyze(write(tmp_path / "logp.jsonl", rows))["steps"]
    assert step["log_odds_gain"] == pytest.approx(math.log(3))
    rows[0]["logp_after"].append(-1.0)
    with pytest.raises(ValueError, match="row 1: logp has 2 tokens and logp_after 3"):
        analyze(write(tmp_path / "logp.jsonl", rows))
    rows[0]["logp_after"] = [-1.0, 0.5]
    with pytest.raises(ValueError, match="row 1: logp_after must be"):
        analyze(write(tmp_path / "logp.jsonl", rows))


def test_rows_without_a_reward_are_counted_and_left_out(tmp_path):
    rows = [*ROWS, {"step": 1, "uid": "a", "score": None, "response_length": 1},
            {"step": 1, "uid": "a", "score": math.nan, "response_length": 1}]
    found = analyze(write(tmp_path / "unscored.jsonl", rows))
    assert found["summary"]["unscored"] == 2
    assert found["summary"]["success"] == 0.5
    assert "2 rows without a reward are left out" in found["notes"]
    with pytest.raises(ValueError, match="none of 2 rows has a reward"):
        analyze(write(tmp_path / "unscored.jsonl", rows[-2:]))


def test_rewards_that_are_not_binary_need_a_threshold(tmp_path):
    rows = [{"uid": 0, "reward": value} for value in (-1, 1, 0.3, -1)]
    path = write(tmp_path / "rewards.jsonl", rows)
    with pytest.raises(ValueError, match=r"not all 0 or 1 but -1, 0\.3, 1: say with --threshold"):
        analyze(path)
    assert analyze(path, threshold=0.3)["summary"]["success"] == 0.5


def test_a_difficulty_of_its_own_makes_a_spectrum(tmp_path):
    rows = [{"uid": prompt, "reward": int(i < 4 - prompt), "level": prompt} for prompt in range(3) for i in range(4)]
    found = analyze(write(tmp_path / "levels.jsonl", rows))["difficulty"]
    assert [(row["bin"], row["success"]) for row in found] == [("0", 1.0), ("1", 0.75), ("2", 0.5)]
    many = [{"uid": prompt, "reward": prompt % 2, "level": prompt / 7} for prompt in range(50)]
    assert sum(row["prompts"] for row in analyze(write(tmp_path / "many.jsonl", many))["difficulty"]) == 50
    rows[0]["level"] = 9
    with pytest.raises(ValueError, match="difficulty of a prompt differs"):
        analyze(write(tmp_path / "levels.jsonl", rows))


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"),
    ("\n\n", "holds no rows"),
    ('{"uid": 1, "reward": 1}\n{"uid": 2, "rew', "line 2: the file is cut off"),
    ('{"uid": 1, "reward": 1}\n{"uid": 2,, }\n', "line 2: no JSON"),
    ("[1, 2]\n", "line 1: must be a JSON object"),
    ('{"uid": 1, "text": "x"}\n', "known to hold the reward; name it with --reward. It has: uid, text"),
    ('{"reward": 1}\n', "known to hold the prompt"),
    ('{"uid": 1, "reward": "yes"}\n', "row 1: reward must be a number, got 'yes'"),
    ('{"uid": 1, "reward": 1e999}\n', "row 1: the reward is infinite"),
    ('{"uid": 1, "reward": 1}\n{"prompt_id": 1, "reward": 1}\n', "row 2: no 'uid', which the first row has"),
    ('{"uid": null, "reward": 1}\n', "row 1: the prompt is null"),
    ('{"uid": 1, "reward": 1, "step": 1.5}\n', "row 1: step must be a whole number"),
    ('{"uid": 1, "reward": 1, "step": NaN}\n', "row 1: step must be a whole number"),
    ('{"uid": 1, "reward": 1, "length": "ab"}\n{"uid": 1, "reward": 1, "length": 3}\n',
     "in tokens, in rows before it was in characters"),
    ('{"uid": 1, "reward": 1, "length": 3}\n{"uid": 1, "reward": 1, "length": "abc"}\n',
     "in characters, in rows before it was in tokens"),
    ('{"uid": 1, "reward": 1, "logp": [0.0, null]}\n', "row 1: logp must be a"),
    ('{"uid": 1, "reward": 1, "step": 1e30}\n', "row 1: step must be a whole number"),
    (f'{{"uid": 1, "reward": 1{"0" * 400}}}\n', "row 1: int too large"),
])
def test_a_malformed_file_is_refused_in_plain_words(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    done = CliRunner().invoke(app, ["analyze", str(path)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "bad.jsonl" in done.stderr
    assert "Traceback" not in done.output


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.npz").write_text("x")
    (tmp_path / "c.jsonl.gz").write_text("x")
    (tmp_path / "d.jsonl").write_bytes(b'{"uid": "\xff"}\n')
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "e.npz", uid=np.arange(3), reward=np.ones(2))
    for name, message in {"a.txt": "must end in one of .jsonl", "b.npz": "no readable npz", "c.jsonl.gz": "gzip",
                          "d.jsonl": "not UTF-8", "empty": "holds no rollout files", "missing.jsonl": "does not exist",
                          "e.npz": "uid 3, reward 2"}.items():
        with pytest.raises(ValueError, match=message):
            analyze(tmp_path / name)


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.jsonl.gz", "rollouts.npz", "rollouts.parquet"])
def test_a_broken_file_is_refused_or_read_whatever_broke_it(tmp_path, name):
    """Bytes flipped, or the end cut off: a ValueError with the file's name, or an answer."""
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez_compressed(path, **{key: np.array([row[key] for row in ROWS]) for key in ROWS[0]})
    elif name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(ROWS), path)
    else:
        text = write(tmp_path / "rollouts.jsonl", ROWS).read_bytes()
        path.write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(150):
        broken = np.frombuffer(whole, dtype=np.uint8).copy()
        if draw.random() < 0.3:
            broken = broken[:draw.integers(len(whole))]
        else:
            at = draw.integers(len(whole), size=draw.integers(1, 12))
            broken[at] = draw.integers(256, size=len(at))
        path.write_bytes(broken.tobytes())
        try:
            analyze(path)
        except ValueError as error:
            refused.append(str(error))
    assert all(name in words for words in refused)
    assert len(refused) > 50


def test_named_columns_come_first_and_must_exist(dump):
    assert analyze(dump, columns={"prompt": "step"})["summary"]["prompts"] == 2
    with pytest.raises(ValueError, match="has no column 'nothing', named by --reward; it has: step, uid"):
        analyze(dump, columns={"reward": "nothing"})


def test_the_command_prints_tables_and_json(dump):
    done = CliRunner().invoke(app, ["analyze", str(dump)])
    assert done.exit_code == 0, done.output
    for expected in ("8 responses to 2 prompts in 2 steps", "prompts by their success rate", "0.25", "lucky guess"):
        assert expected in done.stdout
    done = CliRunner().invoke(app, ["analyze", str(dump), "--json"])
    assert json.loads(done.stdout) == analyze(dump)


def test_markup_in_a_prompt_is_shown_as_it_is(tmp_path):
    rows = [{"prompt": "[bold]x[/] <script>", "reward": i} for i in range(2)]
    done = CliRunner().invoke(app, ["analyze", str(write(tmp_path / "markup.jsonl", rows))])
    assert "[bold]x[/] <script>" in done.stdout
