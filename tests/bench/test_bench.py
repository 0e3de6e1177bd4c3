"""Every benchmark at sizes that take a second: fields, formulas and what is written; no timing is judged."""

import dataclasses
import importlib
import json
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import forked_processes, run_as_torchrun

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports a benchmark the way running it as a script does; its processes find the imports done."""
    monkeypatch.syspath_prepend(BENCH)
    contexts = {"spawn": forked_processes(), "forkserver": multiprocessing.get_context("forkserver")}
    monkeypatch.setattr(multiprocessing, "get_context", contexts.__getitem__)
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
        hidden_size=48, intermediate_size=64, vocab_size=640, memory_prompts=(64,),
    )  # fmt: skip
    written = written_by(script, sizes, tmp_path)
    rows = written["rows"]
    assert [row["model"] for row in rows] == ["qwen2", "qwen3_5"]
    for row in rows:
        assert list(row) == [
            "model", "prompt_tokens", "completions", "response_tokens", "packed_s", "separate_s", "speedup", "bound",
            "packed_peak_mib", "separate_peak_mib", "state_mib_per_completion",
        ]  # fmt: skip
        assert (row["prompt_tokens"], row["completions"], row["response_tokens"]) == (96, 4, 8)
        assert row["bound"] == pytest.approx(4 * (96 + 8) / (96 + 4 * 8))
        assert row["speedup"] == pytest.approx(row["separate_s"] / row["packed_s"])
        assert min(row["packed_peak_mib"], row["separate_peak_mib"]) > 0
    errors = capsys.readouterr().out.split("gradients, row by row: ")[1].split("\n")[0].split(", ")
    assert float(errors[0]) < 1e-5
    assert float(errors[1]) < 0.05, "float32 noise of the decays; tests/models/test_delta_layers.py measures it"
    # Keys and values [1 head of 64] of a token in a layer that attends; 4 layers of `qwen2`, one of `qwen3_5`.
    token = 2 * 64 * 4 / 2**20
    for line in written["memory"]:
        attending = {"qwen2": 4, "qwen3_5": 1}[line["model"]]
        state = {"qwen2": 0, "qwen3_5": 3 * 4 * (2 * 64 * 64 + 3 * (2 * 64 + 2 * 64)) / 2**20}[line["model"]]
        assert line["prompt_mib"] == pytest.approx(attending * token * line["prompt_tokens"])
        assert line["state_mib_per_completion"] == pytest.approx(attending * token * 8 + state)
        assert line["group_mib"] == pytest.approx(line["prompt_mib"] + 4 * line["state_mib_per_completion"])


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


def test_tower_counts_a_call_per_window_and_one_per_length(bench, tmp_path):
    script = bench("tower")
    vision = {"depth": 3, "fullatt_block_indexes": [1], "window_size": 56}
    sizes = dataclasses.replace(script.FULL, frames=(2, 4), repeats=1, height=112, width=140, vision=vision)
    rows = written_by(script, sizes, tmp_path)["rows"]
    assert [row["frames"] for row in rows] == [2, 4]
    for row in rows:
        assert list(row) == ["frames", "calls_loop", "calls_varlen", "loop_s", "varlen_s", "max_difference"]
        pictures = row["frames"] // 2
        # 8 x 10 patches in windows of 4 x 4: six of 4 x 4 and two of 4 x 2, and all of them in the full layer
        assert (row["calls_loop"], row["calls_varlen"]) == ((2 * 6 + 1) * pictures, 2 * 2 + 1)
        assert min(row["loop_s"], row["varlen_s"]) > 0
        assert row["max_difference"] < 1e-5


def test_decode_reads_the_same_frames_by_every_method(bench, tmp_path, monkeypatch):
    pytest.importorskip("decord")
    script = bench("decode")
    monkeypatch.setattr(script, "in_fresh_process", lambda function, *arguments: function(*arguments))
    sizes = dataclasses.replace(script.FULL, seconds=12, fps=2, size=64, max_pixels=56 * 56, chunk_frames=5, repeats=1)
    rows = written_by(script, sizes, tmp_path)["rows"]
    there = [method for method in script.METHODS if script.is_installed(script.decoder_of(method))]
    assert [row["method"] for row in rows] == there
    assert {row["decoder"] for row in rows} >= {"pyav", "decord"}
    for row in rows:
        assert list(row) == ["method", "decoder", "frames", "seconds", "cpu_s", "peak_mib", "imports_mib"]
        assert row["frames"] == 12
        assert min(row["seconds"], row["cpu_s"]) > 0
        assert row["peak_mib"] >= row["imports_mib"] > 0


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


def test_weight_sync_brings_all_weights_in_few_messages(bench, tmp_path):
    script = bench("weight_sync")
    sizes = dataclasses.replace(
        script.FULL, buckets_mib=(0, 1, 512), repeats=1, hidden_size=64, num_layers=2, vocab_size=640
    )
    found = written_by(script, dataclasses.replace(sizes, way_repeats=1), tmp_path)
    rows = found["rows"]
    ways = {(row["way"], row["learning_rate"]): row["share_of_files"] for row in found["ways"]}
    assert ways["files", 1e-6] == 1
    assert ways["broadcast", 1e-6] == 0.5  # of float32 weights, in bfloat16
    assert ways["changed", 1e-6] < 0.1 < ways["changed", 1e-5] < 0.5
    assert [list(row) for row in rows] == [["ranks", "bucket_mib", "tensors", "collectives", "seconds"]] * 3
    assert [(row["ranks"], row["bucket_mib"], row["tensors"]) for row in rows] == [
        (2, size, 27) for size in (0, 1, 512)
    ]
    assert [row["collectives"] for row in rows] == [27, 1, 1]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.vllm
@pytest.mark.slow
def test_rollout_has_a_row_for_every_source_and_encodes_where_it_must(bench, tmp_path):
    pytest.importorskip("vllm")
    script = bench("rollout")
    sizes = dataclasses.replace(script.QUICK, completions=(2,), frames=4, frame_size=56, response_tokens=4)
    rows = written_by(script, sizes, tmp_path)["rows"]
    assert [tuple(row)[:5] for row in rows] == [("engine", "source", "completions", "rollout_s", "encodes")] * 5
    assert [(row["engine"], row["source"], row["encodes"]) for row in rows] == [
        ("vllm", "pixels", 2), ("vllm", "features", 2), ("vllm", "disk", 0), ("hf", "features", 2), ("hf", "disk", 0),
    ]  # fmt: skip
    assert all(row["rollout_s"] > 0 for row in rows)


def test_hour_long_has_a_row_for_every_phase(bench, tmp_path, monkeypatch):
    script = bench("hour_long")

    def forked(command, **options):
        (num_ranks,) = (int(arg.partition("=")[2]) for arg in command if arg.startswith("--nproc_per_node="))
        run_as_torchrun(num_ranks, *command[command.index("longrl") + 1 :])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=forked))
    sizes = dataclasses.replace(script.QUICK, frames=(4,), seconds=8, completions=2, response_tokens=2)
    rows = written_by(script, sizes, tmp_path)["rows"]
    assert [(row["sp"], row["phase"]) for row in rows] == [(sp, phase) for sp in (1, 2) for phase in script.PHASES]
    assert [list(row) for row in rows] == [["tokens", "frames", "sp", "phase", "seconds", "peak_mib"]] * 8
    assert len({row["tokens"] for row in rows}) == 1
    assert all(row["frames"] == 4 and row["tokens"] > 2 * 144 and row["peak_mib"] > 100 for row in rows)


FIELDS = ["model", "phase", "variant", "tokens", "seconds", "tokens_per_s", "tflops", "mfu", "peak_gib", "status"]


def test_gpu_runs_the_same_code_on_a_cpu_and_writes_rows_and_profile(bench, tmp_path):
    script, path, profile = bench("gpu"), tmp_path / "out.json", tmp_path / "profile.txt"
    script.main(["--cpu", "--tiny", "--json", str(path), "--profile", str(profile)])
    found = json.loads(path.read_text())
    assert found["command"] == "python bench/gpu.py --cpu --tiny --minutes 7.5"
    assert (found["gpu"], found["skipped"]) == ({}, [])
    assert found["check"]["kernel"] == "CpuFlashKernel"
    assert max(found["check"]["relative_errors"].values()) < script.MAX_ERROR
    assert [(row["phase"], row["variant"], row["tokens"]) for row in found["rows"]] == [
        *(("encode", "", 64), ("prefill", "", 64), ("decode", "", 64)),
        *(("update", "packed", 64), ("update", "separate", 64)),
        *(("encode", "", 128), ("prefill", "", 128), ("decode", "", 128), ("update", "packed", 128)),
    ]
    for row in found["rows"]:
        assert list(row) == FIELDS
        assert row["status"] == "ok"
    packed, separate = found["rows"][3:5]
    assert packed["tokens_per_s"] * packed["seconds"] == pytest.approx(64 + 2 * 4)
    assert separate["tokens_per_s"] * separate["seconds"] == pytest.approx(2 * (64 + 4))
    assert "_SharedPrefix" in profile.read_text()
    assert str(tmp_path) not in path.read_text()


def test_gpu_lists_what_the_time_does_not_suffice_for(bench, tmp_path):
    script, path = bench("gpu"), tmp_path / "out.json"
    sizes = dataclasses.replace(script.TINY_SIZES, tokens=(64,))
    script.main(["--cpu", "--tiny", "--minutes", "0", "--json", str(path)], sizes)
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert [line.partition(":")[0] for line in found["skipped"]] == [
        "tiny encode 64", "tiny prefill 64", "tiny update packed 64", "tiny update separate 64",
    ]  # fmt: skip


def test_gpu_keeps_a_row_that_ran_out_of_memory_and_goes_on(bench, tmp_path, monkeypatch):
    script, path = bench("gpu"), tmp_path / "out.json"
    sizes = dataclasses.replace(script.TINY_SIZES, tokens=(64,))

    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(script.Case, "generate", full)
    script.main(["--cpu", "--tiny", "--json", str(path)], sizes)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["phase"], row["status"], row["seconds"] is None) for row in rows] == [
        ("encode", "ok", False), ("prefill", "out of memory", True), ("update", "ok", False), ("update", "ok", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), [([], "needs a GPU.*--cpu --tiny"), (["--cpu"], "--cpu needs --tiny")])
def test_gpu_refuses_without_one(bench, argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench("gpu").main(argv)
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_gpu_stops_where_the_kernel_is_wrong(bench, monkeypatch):
    script = bench("gpu")
    monkeypatch.setattr(script, "_flash", lambda query, *others: 1.1 * script._dense(query, *others))
    with pytest.raises(RuntimeError, match="CpuFlashKernel is wrong here"):
        script.check(script.TINY_SIZES, torch.device("cpu"))


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
