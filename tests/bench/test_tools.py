"""The bench of tools: which commands it runs, what it reads of them; and steps with and without tools."""

import csv
import importlib
import json
from pathlib import Path

import pytest

from longrl.testing.needles import NeedleConfig, write_needle_base, write_needles

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def test_stages_are_trained_one_from_the_other_and_asked_alike(bench, tmp_path, monkeypatch):
    tools = bench("tools")
    commands = []

    def run(command):
        commands.append(command)
        folder = Path(next(word for word in command if word.startswith("--run_dir=")).partition("=")[2])
        if command[0] == "test":
            (folder / "test").mkdir(parents=True)
            scores = {"overall": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
            (folder / "test" / "results.json").write_text(json.dumps({"conditions": {"": {"scores": scores}}}))
            lines = [{"turns": [[{"calls": [{}, {}]}, {"calls": []}]]}, {"turns": [[{"calls": []}]]}, {}]
            (folder / "test" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr("demo_runs.run_command", run)
    stages = tools.Stages(tmp_path, ("--trainer.max_steps=2",))
    stages.fit("rl", "grpo.yaml", "train", "--model.init_from=x", tools.NO_TOOLS)
    row = stages.test("rl")
    fit, test = commands
    assert [fit[0], test[0]] == ["fit", "test"]
    assert {f"--run_dir={tmp_path / 'rl'}", "--model.init_from=x", tools.NO_TOOLS, "--trainer.max_steps=2"} <= {*fit}
    assert f"--model.init_from={tmp_path / 'rl'}" in test
    fields = ["stage", "accuracy", "low", "high", "n", "calls_per_answer", "seconds"]
    assert list(row) == fields
    assert (row["stage"], row["accuracy"], row["n"], row["calls_per_answer"]) == ("rl", 0.5, 9, 0.667)


def test_the_curve_has_calls_and_rewards_of_every_step(bench, tmp_path):
    tools = bench("tools")
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        table = csv.DictWriter(file, ["step", "rollout/tool_calls", "reward/mean"])
        table.writeheader()
        table.writerows({"step": n, "rollout/tool_calls": 0.5 * n, "reward/mean": 0.1 * n} for n in range(3))
    assert tools.calls_by_step(tmp_path) == [
        {"step": n, "calls_per_answer": 0.5 * n, "reward": pytest.approx(0.1 * n)} for n in range(3)
    ]


@pytest.mark.slow
def test_steps_with_and_without_tools_have_as_many_tokens(bench, tmp_path, monkeypatch):
    steps = bench("tool_steps")
    write_needles(tmp_path / "data", NeedleConfig(num_train_videos=2, num_eval_videos=0, size=56))
    write_needle_base(BENCH.parent / "configs" / "demo" / "base", tmp_path / "base")
    monkeypatch.setattr(steps, "MAX_TOKENS", 24)
    monkeypatch.setattr(steps, "TURN_TOKENS", 8)
    monkeypatch.setattr(steps, "NUM_GENERATIONS", 2)
    rows = steps.step_rows(tmp_path, num_prompts=2, repeats=1)
    assert [row["step"] for row in rows] == ["tools", "same_tokens", "same_sampled"]
    tools, same, sampled = (row["tokens_per_completion"] for row in rows)
    assert tools == same > sampled > 0
    for row in rows:
        assert row["tools_to_this"] == pytest.approx(rows[0]["seconds"] / row["seconds"], rel=0.02, abs=2e-3)
