"""The bench of preferences: which commands it runs, and what it reads of them."""

import csv
import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("preferences")


def option(command, name):
    return next(word for word in command if word.startswith(f"--{name}=")).partition("=")[2]


def test_methods_begin_from_one_cold_start_and_are_asked_alike(bench, tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        if command[0] == "own-answers":
            Path(option(command, "out")).write_text('{"chosen": "A"}\n' * 3)
        if command[0] == "test":
            folder = Path(option(command, "run_dir")) / "test"
            folder.mkdir(parents=True)
            scores = {"overall": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
            (folder / "results.json").write_text(json.dumps({"conditions": {"": {"scores": scores}}}))

    monkeypatch.setattr("demo_runs.run_command", run)
    made = bench.Bench(tmp_path, bench.FULL)
    (tmp_path / "data").mkdir()
    made.train_file.write_text('{"problem": "Which?"}\n' * 4)
    rows = [made.cold_start(), *(made.train(method) for method in bench.LOSSES), made.imitate()]
    assert [row["method"] for row in rows] == ["sft", "dpo", "ipo", "mpo", "rft"]
    assert [*rows[1]] == ["method", "steps", "seconds", "accuracy", "low", "high", "n"]
    fits = {Path(option(command, "run_dir")).name: command for command in commands if command[0] == "fit"}
    for method in ("dpo", "ipo", "mpo", "rft"):
        assert option(fits[method], "model.init_from") == str(tmp_path / "sft")
    assert option(fits["mpo"], "data.train") == str(tmp_path / "data" / "pairs.jsonl")
    assert option(fits["rft"], "data.train") == str(tmp_path / "data" / "sft.jsonl")
    assert option(fits["rft"], "data.stage") == "sft"
    answered = made.answer()
    assert (answered["questions"], answered["pairs"], answered["sft"]) == (4, 3, 3)
    kinds = [option(command, "kind") for command in commands if command[0] == "own-answers"]
    assert kinds == ["pairs", "sft"]


def test_margins_are_those_of_the_first_and_the_last_step(bench, tmp_path):
    path = tmp_path / "dpo" / "logs" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    names = [f"train/{name}" for name in bench.CURVES]
    with path.open("w") as file:
        table = csv.DictWriter(file, ["step", *names])
        table.writeheader()
        table.writerows({"step": n, **dict.fromkeys(names, 0.25 * n)} for n in range(3))
    row = bench.Bench(tmp_path, bench.FULL).margins("dpo")
    assert (row["method"], row["loss_first"], row["reward_margin_last"]) == ("dpo", 0.0, 0.5)
