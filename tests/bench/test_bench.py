"""Every benchmark at sizes that take a second: fields, formulas and what is written; no timing is judged."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports a benchmark the way running it as a script does."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def written_by(script, sizes, folder):
    path = folder / "results" / "out.json"
    script.main(["--json", str(path)], sizes)
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
    return json.loads(path.read_text())


def test_shared_prefix_has_the_promised_fields_and_equal_gradients(bench, tmp_path, capsys):
    script = bench("shared_prefix")
    sizes = dataclasses.replace(
        script.FULL, prompt_tokens=(96,), completions=(4,), response_tokens=8, timed_tokens=1,
        hidden_size=64, intermediate_size=64, vocab_size=640,
    )  # fmt: skip
    (row,) = written_by(script, sizes, tmp_path)["rows"]
    assert list(row) == [
        "prompt_tokens", "completions", "response_tokens", "packed_s", "separate_s", "speedup", "bound",
        "packed_peak_mib", "separate_peak_mib",
    ]  # fmt: skip
    assert (row["prompt_tokens"], row["completions"], row["response_tokens"]) == (96, 4, 8)
    assert row["bound"] == pytest.approx(4 * (96 + 8) / (96 + 4 * 8))
    assert row["speedup"] == pytest.approx(row["separate_s"] / row["packed_s"])
    assert min(row["packed_peak_mib"], row["separate_peak_mib"]) > 0
    error = capsys.readouterr().out.split("gradients, row by row: ")[1].split()[0]
    assert float(error) < 1e-5


def test_encode_once_counts_one_encoding_per_video(bench, tmp_path):
    script = bench("encode_once")
    sizes = dataclasses.replace(
        script.FULL, frames=(2, 4), completions=2, response_tokens=2, repeats=1, frame_size=56,
        text={}, vision={},
    )  # fmt: skip
    rows = written_by(script, sizes, tmp_path)["rows"]
    assert [row["frames"] for row in rows] == [2, 4]
    for row in rows:
        assert list(row) == ["frames", "reuse_s", "no_reuse_s", "speedup", "encodes_per_video"]
        assert row["encodes_per_video"] == 1
        assert row["speedup"] == pytest.approx(row["no_reuse_s"] / row["reuse_s"])


def test_encode_once_counts_every_encoding_without_reuse(bench, tmp_path):
    script = bench("encode_once")
    sizes = dataclasses.replace(script.FULL, completions=3, response_tokens=2, frame_size=56, text={}, vision={})
    step = script.Step(sizes, script.family_of(sizes, tmp_path), num_frames=2)
    step.no_reuse()
    assert step.encodes == sizes.videos * (1 + 3 * 3)


def test_json_says_how_to_repeat_the_run_and_names_no_path(bench, tmp_path):
    common = bench("common")
    arguments = common.parse_arguments("x", ["--quick", "--json", str(tmp_path / "a.json")])
    found = common.provenance("some_bench", arguments)
    assert found["command"] == "python bench/some_bench.py --json a.json --quick"
    assert found["hardware"].keys() == {"cpu", "cores", "threads", "memory_gib"}
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.slow
def test_mr_sp_has_the_promised_fields(bench, tmp_path):
    script = bench("mr_sp")
    model = dataclasses.replace(script.FULL.model, frame_size=56, text={}, vision={})
    sizes = dataclasses.replace(script.FULL, tokens=(300,), frames=(2,), completions=2, response_tokens=2, repeats=1)
    found = written_by(script, dataclasses.replace(sizes, model=model), tmp_path)
    assert [(row["tokens"], row["sp"]) for row in found["rows"]] == [(300, 1), (300, 2)]
    for row in found["rows"]:
        assert list(row) == ["tokens", "sp", "update_s", "peak_mib", "speedup", "peak_ratio"]
        assert row["speedup"] == pytest.approx(found["rows"][0]["update_s"] / row["update_s"])
    (step,) = found["steps"]
    assert list(step) == [
        "frames", "no_reuse_s", "stage_1_s", "stage_1_2_s", "stage_1_speedup", "stage_1_2_speedup",
    ]  # fmt: skip
    assert step["stage_1_speedup"] == pytest.approx(step["no_reuse_s"] / step["stage_1_s"])


@pytest.mark.slow
def test_hearing_asks_four_ways_after_each_stage(bench, tmp_path):
    script = bench("hearing")
    sizes = script.Sizes(train_tones=4, eval_tones=4, sft_steps=1, rl_steps=1, prompts=2, generations=2)
    found = written_by(script, sizes, tmp_path)["rows"]
    ways = ["its own", "silence", "another's", "no sound"]
    assert [(row["stage"], row["sound"]) for row in found] == [(stage, way) for stage in ("sft", "rl") for way in ways]
    assert all(0 <= row["low"] <= row["right"] <= row["high"] <= 1 for row in found)


def test_hearing_counts_with_wilsons_bounds(bench):
    """8 of 10: 0.49 to 0.943, as in Brown, Cai and DasGupta (2001)."""
    assert bench("hearing").wilson([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-3)
