"""The bench of tools: which commands it runs, what it reads of them; and steps with and without tools."""

import csv
import json

import pytest

from longrl.testing.needles import NeedleConfig, write_needle_base, write_needles
from tests.bench.stand_ins import write_scores
from tests.runs import ROOT


def test_stages_are_trained_one_from_the_other_and_asked_alike(import_bench, tmp_path, monkeypatch):
    tools = import_bench("tools")
    commands = []

    def run(command):
        commands.append(command)
        if command[0] == "test":
            folder = write_scores(command)
            lines = [{"turns": [[{"calls": [{}, {}]}, {"calls": []}]]}, {"turns": [[{"calls": []}]]}, {}]
            (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

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


def test_the_curve_has_calls_and_rewards_of_every_step(import_bench, tmp_path):
    tools = import_bench("tools")
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
def test_steps_with_and_without_tools_have_as_many_tokens(import_bench, tmp_path, monkeypatch):
    steps = import_bench("tool_steps")
    write_needles(tmp_path / "data", NeedleConfig(num_train_videos=2, num_eval_videos=0, size=56))
    write_needle_base(ROOT / "configs" / "demo" / "base", tmp_path / "base")
    monkeypatch.setattr(steps, "MAX_TOKENS", 24)
    monkeypatch.setattr(steps, "TURN_TOKENS", 8)
    monkeypatch.setattr(steps, "NUM_GENERATIONS", 2)
    rows = steps.step_rows(tmp_path, num_prompts=2, repeats=1)
    assert [row["step"] for row in rows] == ["tools", "same_tokens", "same_sampled"]
    tools, same, sampled = (row["tokens_per_completion"] for row in rows)
    assert tools == same > sampled > 0
    for row in rows:
        assert row["tools_to_this"] == pytest.approx(rows[0]["seconds"] / row["seconds"], rel=0.02, abs=2e-3)
