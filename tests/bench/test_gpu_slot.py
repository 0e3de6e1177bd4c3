"""bench/gpu_slot.sh: what it runs, and that a step which fails loses nothing; no GPU is asked for anything."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
echo "python $*"
case "$*" in *"$FAILING"*) exit 3 ;; esac
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


def slot(folder, *arguments, failing="nothing"):
    """Runs the script with a stand-in for Python; -> (its exit code, commands without the folder of results)."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(folder / "out"), "FAILING": failing}
    command = ["bash", str(ROOT / "bench" / "gpu_slot.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.replace(f"{folder}/out", "OUT") for line in done.stdout.splitlines()]
    return done.returncode, [line.removeprefix("python ") for line in lines if line.startswith("python ")]


TESTS, GPU, STEP = (
    "-m pytest tests/packing/test_attention.py",
    "bench/gpu.py --minutes 4.5 --json OUT/gpu.json --profile OUT/update.txt --cpu --tiny",
    "bench/hour_step.py --json OUT/hour_step.json --cpu --tiny",
)


@pytest.mark.parametrize(("part", "steps"), [((), [TESTS, GPU, STEP]), (("1",), [TESTS, GPU]), (("2",), [STEP])])
def test_the_slot_runs_kernels_rows_and_whole_steps(tmp_path, part, steps):
    code, commands = slot(tmp_path, *part, "--cpu", "--tiny")
    assert code == 0
    assert len(commands) == len(steps)
    for command, wanted in zip(commands, steps, strict=True):
        if wanted == TESTS:
            assert command.startswith("-m pytest ")
            assert "tests/packing/test_attention.py" in command.split()
            assert "-m gpu -q" in command
        else:
            assert command == wanted


def test_a_step_that_fails_does_not_end_the_others_and_is_told(tmp_path):
    code, commands = slot(tmp_path, "--cpu", "--tiny", failing="bench/gpu.py")
    assert code == 1
    assert commands[-1] == STEP
    assert (tmp_path / "out" / "gpu.log").read_text().startswith("python bench/gpu.py")


def test_a_benchmark_starts_where_longrl_is_not_installed(bench, monkeypatch):
    """On PYTHONPATH alone."""

    common, real = bench("common"), importlib.metadata.version

    def version(name):
        if name == "longrl":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    common = importlib.reload(common)
    found = common.provenance("gpu", common.parse_arguments("x", []))
    assert found["versions"].keys() == {"python", "longrl", "torch", "transformers"}
    assert str(ROOT) in common.import_path().split(os.pathsep)


# ---- hour_step.py ----


def test_steps_on_a_gpu_take_the_recipe_with_random_weights_made_there(bench, tmp_path):
    script = bench("hour_step")
    offload, lora, sharded = (script.changes_of(step, script.FULL, tmp_path, False) for step in script.FULL.steps)
    for changes in (lora, sharded, offload):
        assert changes["model"]["family"]["init_args"]["init_device"] == "cuda"
        assert changes["trainer"]["accelerator"] == "gpu"
        assert changes["rollout"]["engine"]["class_path"] == "longrl.engines.hf.HFEngine"  # there is no vLLM
    assert script.FULL.steps[1].frames // 2 * 144 == 131_040
    assert (lora["trainer"]["precision"], "strategy" in lora["trainer"]) == ("bf16-mixed", False)
    assert sharded["model"]["family"]["init_args"]["dtype"] == "float32"
    found = [changes["trainer"]["strategy"]["init_args"]["sharding"] for changes in (sharded, offload)]
    assert found == [{"compute_dtype": "bfloat16", "offload": offloaded} for offloaded in (False, True)]


def test_every_row_is_written_at_once_also_of_a_step_that_failed(bench, tmp_path, monkeypatch):
    script, path, counts = bench("hour_step"), tmp_path / "out.json", []

    def run(command, limit_s):
        counts.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return "ok" if len(counts) > 1 else "status 1: out of memory"

    monkeypatch.setattr(script, "run", run)
    script.main(["--cpu", "--tiny", "--json", str(path)])
    found = json.loads(path.read_text())
    assert counts == [0, 1, 2]
    assert [(row["case"], row["status"]) for row in found["rows"]] == [
        ("offload", "status 1: out of memory"), ("lora", "ok"), ("sharded", "ok"),
    ]  # fmt: skip
    assert found["command"] == "python bench/hour_step.py --cpu --tiny"
    assert {"commit", "hardware", "versions"} <= found.keys()


@pytest.mark.parametrize(
    ("code", "limit_s", "status"),
    [
        ("pass", 60, "ok"),
        ("print('why'); raise SystemExit(2)", 60, "status 2: why"),
        ("import time; time.sleep(9)", 0.2, "not over after 0.2 s"),
    ],
)
def test_what_became_of_a_step_is_said(bench, code, limit_s, status):
    assert bench("hour_step").run([sys.executable, "-c", code], limit_s) == status


@pytest.mark.slow
def test_a_whole_step_runs_on_a_cpu_and_trains(bench, tmp_path):
    (row,) = bench("hour_step").main(["--cpu", "--tiny", "--only", "sharded"])
    assert row["status"] == "ok"
    assert row["grad_norm"] > 0
    assert all(row[f"{phase}_s"] > 0 for phase in ("encode", "generate", "update"))
