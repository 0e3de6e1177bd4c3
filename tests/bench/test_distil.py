"""The bench of distillation: which commands it runs, and what it reads of them."""

import csv
import json
from pathlib import Path

import pytest

from tests.bench.stand_ins import option, write_scores


@pytest.fixture
def distil(import_bench):
    return import_bench("distil")


def test_both_ways_start_from_one_checkpoint_and_are_asked_alike(distil, tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        if command[0] == "synthetic":
            return
        folder = Path(option(command, "run_dir"))
        if command[0] == "test":
            write_scores(command)
            return
        path = folder / "logs" / "version_0" / "metrics.csv"
        path.parent.mkdir(parents=True)
        passes = {distil.PASSES: 1.0} if folder.name == "distil" else {}
        with path.open("w") as file:
            table = csv.DictWriter(file, ["step", "train/loss", *passes])
            table.writeheader()
            table.writerows({"step": step, "train/loss": 0.1, **passes} for step in range(3))

    monkeypatch.setattr("demo_runs.run_command", run)
    monkeypatch.setattr("demo_runs.tempfile.mkdtemp", lambda prefix: str(tmp_path / "runs"))
    rows = distil.main(["--quick", "--json", str(tmp_path / "found.json")])
    assert [(row["method"], row["steps"], row["teacher_passes_per_group"]) for row in rows] == [
        ("rl", 3, 0), ("distil", 3, 1.0),
    ]  # fmt: skip
    fields = ["method", "steps", "seconds", "accuracy", "low", "high", "n", "teacher_passes_per_group"]
    assert all(list(row) == fields for row in rows)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["method"] for row in found["before"]] == ["sft", "teacher_sft", "teacher"]

    by_name = {Path(option(one, "run_dir")).name: one for one in commands if one[0] == "fit"}
    assert list(by_name) == ["sft", "teacher_sft", "teacher", "rl", "distil"]
    assert by_name["teacher"].index("--trainer.max_steps=60") < by_name["teacher"].index("--trainer.max_steps=2")
    assert {*distil.MORE_FRAMES} <= {*by_name["teacher"]}
    sft = str(tmp_path / "runs" / "sft")
    assert option(by_name["rl"], "model.init_from") == option(by_name["distil"], "model.init_from") == sft
    assert option(by_name["distil"], "model.teacher.init_args.init_from") == str(tmp_path / "runs" / "teacher")
    tests = {Path(option(one, "run_dir")).name: one for one in commands if one[0] == "test"}
    more = [flag for flag in distil.MORE_FRAMES if flag in tests["distil"]]
    assert not more
    assert {*distil.MORE_FRAMES} <= {*tests["teacher"]}


def test_the_student_has_a_third_of_the_steps_and_its_teacher_twice_the_frames(distil):
    import yaml

    stages = {name: yaml.safe_load((distil.CONFIGS / name).read_text()) for name in (
        "common.yaml", "grpo.yaml", "distil/teacher.yaml", "distil/student.yaml")}  # fmt: skip
    student, rl = stages["distil/student.yaml"], stages["grpo.yaml"]
    assert 3 * student["trainer"]["max_steps"] <= rl["trainer"]["max_steps"]
    completions = stages["common.yaml"]["rollout"]["sampling"]["num_generations"] * rl["data"]["prompts_per_batch"]
    assert student["data"]["prompts_per_batch"] * student["rollout"]["sampling"]["num_generations"] == completions
    seen, own = stages["common.yaml"]["data"]["video"], student["data"]["teacher_view"]["video"]
    assert own == stages["distil/teacher.yaml"]["data"]["video"] == {name: 2 * value for name, value in seen.items()}
    assert {*distil.MORE_FRAMES} == {f"--data.video.{name}={value}" for name, value in own.items()}
