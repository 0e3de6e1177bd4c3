"""The bench of preferences: which commands it runs, and what it reads of them."""

import csv
from pathlib import Path

import pytest

from tests.bench.stand_ins import option, write_scores


@pytest.fixture
def bench(import_bench):
    return import_bench("preferences")


def test_methods_begin_from_one_cold_start_and_are_asked_alike(bench, tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        if command[0] == "own-answers":
            Path(option(command, "out")).write_text('{"chosen": "A"}\n' * 3)
        if command[0] == "test":
            write_scores(command)

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
