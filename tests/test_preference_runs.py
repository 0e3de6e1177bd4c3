"""Runs on pairs through the command line: what they log and save, how they go on, and which rows they leave out."""

import json

import pytest

from tests.runs import checkpoint, metrics, run, text_config
from tests.test_metrics_documented import OF_PAIRS, documented, logged
from tests.test_resume import assert_same_end

MPO = {"preference_weight": 0.8, "quality_weight": 0.2, "generation_weight": 1.0, "beta": 0.5}
OF_VAL = {name.replace("train/", "val/") for name in OF_PAIRS} - {"val/reward_shift"}


def pairs(path, count=6, **fields):
    """Records in two spellings, of uneven lengths."""
    records = []
    for number in range(count):
        question = {"problem": "Which one? " * (1 + number % 3), "problem_id": str(number)}
        if number % 2:
            question = {"prompt": [{"role": "user", "content": "And which?"}], "id": str(number)}
        answers = {"chosen": "The first " * (1 + number), "rejected": f"Number {number}"}
        records.append(question | answers | fields)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def mpo(folder, **trainer):
    """2 epochs of 3 steps, validation after each, a checkpoint every 2 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    values = text_config(pairs(folder / "pairs.jsonl"), "preference")
    values["trainer"] |= {"max_epochs": 2, **trainer}
    values["data"]["val"] = str(folder / "pairs.jsonl")
    values["model"] |= {"preference": MPO, "optimizer": {"lr": 1e-3}}
    values["checkpoint"] = {"every_n_train_steps": 2}
    return values


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return run(folder / "run", mpo(folder))


def test_a_run_on_pairs_logs_what_is_documented(reference):
    names = logged(reference)
    of_validation = {name for name in names if name.startswith("val/")}
    assert of_validation == OF_VAL | {"val/loss"}
    assert names - of_validation < documented()
    assert names >= OF_PAIRS
    values = metrics(reference)
    assert float(values[0, "train/reward_margin"]) == pytest.approx(0.0, abs=1e-5)
    assert float(values[0, "train/reward_shift"]) == 0.0
    assert float(values[5, "train/reward_margin"]) > 0.0
    assert float(values[5, "val/preference_accuracy"]) > 0.5


def test_a_run_on_pairs_that_was_interrupted_ends_as_the_uninterrupted_one(reference, tmp_path):
    """The mean reward is in the checkpoint; the reference is what the run began with, not what it goes on from."""
    values = mpo(reference.parent)
    folder = run(tmp_path / "run", values | {"trainer": values["trainer"] | {"max_steps": 3}})
    assert checkpoint(folder)["reward_shift"]["count"] == 12
    run(folder, values, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")
    assert_same_end(folder, reference)
    assert checkpoint(folder)["reward_shift"]["count"] == 24


def test_validate_compares_with_what_the_run_began_with(reference, tmp_path, capsys):
    values = mpo(reference.parent)
    folder = tmp_path / "validated"
    run(folder, values, f"--ckpt_path={reference / 'checkpoints' / 'last.ckpt'}", command="validate")
    found = metrics(folder, "validate_logs") or metrics(folder)
    last = metrics(reference)
    ((_, accuracy),) = [(step, value) for (step, name), value in found.items() if name == "val/preference_accuracy"]
    assert accuracy == last[5, "val/preference_accuracy"]


def test_rows_that_are_no_pair_end_the_run_before_it_begins_or_are_listed(tmp_path):
    values = mpo(tmp_path, max_steps=1)
    path = tmp_path / "pairs.jsonl"
    good = path.read_text()
    path.write_text(good + json.dumps({"problem": "Which?", "answer": "A", "problem_id": "7"}) + "\n")
    values["data"] |= {"max_skipped_share": 0.5, "val": None}
    with pytest.raises(ValueError, match=r"1 of 7 records.*row '7' needs 'chosen', which is missing.*bad_records=skip"):
        run(tmp_path / "error", values)
    path.write_text(good + json.dumps({"problem": "Which?", "chosen": "A ", "rejected": "A ", "problem_id": "8"}))
    values["data"]["bad_records"] = "skip"
    folder = run(tmp_path / "skip", values)
    listed = (folder / "skipped.jsonl").read_text()
    assert "row '8' has the same answer as chosen and as rejected" in listed


def test_targets_to_the_letter_teach_sft(tmp_path):
    """As rejection sampling writes them."""
    path = pairs(tmp_path / "pairs.jsonl", rejected=None, answer="A")
    values = text_config(path, "sft")
    values["trainer"] |= {"max_steps": 1}
    folder = run(tmp_path / "run", values)
    assert (0, "train/loss") in metrics(folder)


def test_pairs_are_never_shown_blind(tmp_path):
    values = mpo(tmp_path)
    values["data"]["blind_share"] = 0.1
    with pytest.raises(ValueError, match="data.blind_share must be 0 with data.stage=preference, got 0.1"):
        run(tmp_path / "run", values)
