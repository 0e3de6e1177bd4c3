"""Runs of the command line on a mix: videos with subtitles and reasoning, and text rows of another schema without."""

import json
from collections import Counter

import pytest
import torch

from tests.runs import config, data_order, run, videos

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Subtitles of one of three videos, and five text rows."""
    found = tmp_path_factory.mktemp("mix")
    (found / "train_000001.srt").write_text("1\n00:00:00,000 --> 00:00:09,000\nthe circle is red\n")
    records = [{"id": f"text{n}", "question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(5)]
    (found / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return found


def mixed(folder, stage="sft", **trainer):
    values = config(stage)
    values["trainer"] |= {"max_epochs": -1, "limit_val_batches": 0, **trainer}
    values["model"]["optimizer"] = {"lr": 1e-3}
    values["data"] |= {
        "train": [
            {"source": str(videos() / "train.jsonl"), "weight": 3},
            {"source": str(folder / "text.jsonl"), "weight": 1,
             "row_function": "longrl.datamodules.rows.text_math_row"},
        ],
        "subtitles": {"source": str(folder), "lines": "all"},
        "prompts_per_batch": 4,
    }  # fmt: skip
    values["checkpoint"] = {"every_n_train_steps": 3}
    return values


def test_a_mixed_run_that_is_resumed_ends_as_the_uninterrupted_one(folder, tmp_path):
    whole = run(tmp_path / "whole", mixed(folder, max_steps=7))
    first = run(tmp_path / "parts", mixed(folder, max_steps=3))
    run(first, mixed(folder, max_steps=7), f"--ckpt_path={first / 'checkpoints' / 'last.ckpt'}")
    assert data_order(first) == data_order(whole)
    one, other = (
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (whole, first)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_step_of_rl_has_the_shares_of_the_mix(folder, tmp_path):
    found = run(tmp_path / "rl", mixed(folder, "rl", max_steps=4))
    steps = [json.loads(line)[1] for line in (found / "order.jsonl").read_text().splitlines()]
    assert steps
    shares = Counter(name.startswith("text") for step in steps[:2] for name in step)
    assert shares == {False: 6, True: 2}
