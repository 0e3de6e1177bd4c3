"""The bench of T-GRPO: its questions, how its runs differ, and how sure it says that it is."""

import json
import random
from pathlib import Path

import pytest
import torch

from longrl.io.jsonl import write_jsonl
from longrl.testing.synthetic_videos import SyntheticConfig, make_records
from tests.bench.stand_ins import option

OWN = ("--run_dir", "--data.seed", "--rollout.seed", "--rollout.frame_order")


@pytest.fixture
def script(import_bench):
    return import_bench("frame_order")


def test_methods_differ_in_the_bonus_alone_and_are_asked_alike(script, tmp_path, monkeypatch):
    """Of 4 questions GRPO answers 2 in order and 1 shuffled, strict T-GRPO 4 and 1."""
    commands = []

    def run(command):
        commands.append(command)
        if command[0] == "synthetic":
            Path(option(command, "out")).mkdir(parents=True)
        if command[0] == "evaluate":
            ordered = [1.0] * 4 if "strict" in option(command, "out") else [1.0, 1.0, 0.0, 0.0]
            lines = [{"condition": "video", "strict_accuracy": value} for value in ordered]
            lines += [{"condition": "video, shuffled", "strict_accuracy": value} for value in (1.0, 0.0, 0.0, 0.0)]
            Path(option(command, "out")).mkdir(parents=True)
            write_jsonl(Path(option(command, "out")) / "samples.jsonl", lines)

    monkeypatch.setattr("demo_runs.run_command", run)
    monkeypatch.setattr("demo_runs.tempfile.mkdtemp", lambda prefix: str(tmp_path / "runs"))
    rows = script.main(["--quick", "--json", str(tmp_path / "out.json")])

    fits = [command for command in commands if command[0] == "fit"][1:]
    assert [option(command, "rollout.frame_order") is None for command in fits] == [True, False, False, False]
    ratios = [json.loads(option(command, "rollout.frame_order"))["ratio"] for command in fits[1:]]
    assert ratios == [0.8, 1.25, 0.0]
    assert len({tuple(word for word in command if not word.startswith(OWN)) for command in fits}) == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows
    assert list(rows[0]) == [
        "method", "steps", "seconds", "accuracy_ordered", "accuracy_shuffled", "loss", "low", "high", "n",
        "difference", "difference_low", "difference_high", "p",
    ]  # fmt: skip
    assert [(row["method"], row["loss"], row["n"]) for row in rows] == [
        ("grpo", 0.25, 4), ("t_grpo", 0.25, 4), ("t_grpo_strict", 0.75, 4), ("bonus_always", 0.25, 4),
    ]  # fmt: skip
    assert [row["difference"] for row in rows] == ["", 0.0, 0.5, 0.0]
    assert [row["seed"] for row in written["seeds"]] == [0, 0, 0, 0]
    assert written["before"][0]["loss"] == 0.25


@pytest.mark.parametrize("words", [("first",), ("first", "last")])
def test_questions_ask_what_comes_first_in_a_story_and_no_letter_is_favoured(script, words):
    records, clips = make_records(SyntheticConfig(num_train_videos=200, num_eval_videos=0, fps=2))
    stories = {clip.path: [scene.name for scene in clip.story.scenes] for clip in clips}
    letters, asked_for = [], []
    for row in records["train"]:
        objects = stories[row["videos"]]
        asked = script.about_order(row, objects, words)
        if row["problem_type"] != "temporal":
            assert asked == row
            continue
        letter = asked["answer"][len("<answer>")]
        word = "first" if "first" in asked["problem"] else "last"
        right = objects[0 if word == "first" else -1]
        assert f"{letter}. {right}" in asked["problem"]
        options = [line[3:] for line in asked["problem"].splitlines()[1:]]
        assert len(set(options)) == 4
        assert set(options) <= {*objects}, "all are in the video"
        assert asked["reasoning"].endswith(f". The {right} comes {word}.")
        letters.append(letter)
        asked_for.append(word)
    assert len(letters) == 200
    assert all(letters.count(letter) > 30 for letter in "ABCD")
    assert all(asked_for.count(word) > 70 for word in words)


def test_the_interval_is_that_of_questions_drawn_anew(script):
    values = torch.tensor([1.0] * 60 + [0.0] * 40, dtype=torch.float64)
    low, high, p = script.bootstrap(values)
    rng = random.Random(1)
    means = sorted(sum(rng.choices(values.tolist(), k=100)) / 100 for _ in range(4000))
    assert (low, high) == pytest.approx((means[100], means[3899]), abs=0.011)
    assert p == 0.0
    assert script.bootstrap(torch.tensor([1.0, -1.0] * 20).double())[2] > 0.9
    right = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert script.per_question(right).tolist() == [0.5, 0.0]
