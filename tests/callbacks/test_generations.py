"""Which steps leave samples."""

import json
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.generations import Generations
from longrl.types import Batch, Completion, Group, Prompt, Row


def batch():
    row = Row(id="1", problem="Which?", answer="B")
    prompt = Prompt("1", torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), (), row)
    answer = Completion(torch.zeros(1), torch.zeros(1), "B", "stop")
    return Batch([prompt], groups=[Group(prompt, [answer], rewards=torch.ones(1))])


@pytest.mark.parametrize(("steps_per_rollout", "shown"), [(1, [5, 10]), (2, [6, 10]), (4, [8, 12]), (6, [6, 12])])
def test_a_rollout_that_passes_a_multiple_is_shown(tmp_path, steps_per_rollout, shown):
    callback = Generations(every_n_steps=5)
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, global_step=0, loggers=[])
    while trainer.global_step < 11:
        callback.on_train_batch_start(trainer, None, batch(), 0)
        trainer.global_step += steps_per_rollout
        callback.on_train_batch_end(trainer, None, None, batch(), 0)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == shown


def test_a_run_that_goes_on_repeats_no_sample(tmp_path):
    """Killed after step 9 and resumed from the checkpoint of step 6: samples of step 8 are written once."""
    for first, last in ((0, 9), (6, 10)):
        callback = Generations(every_n_steps=2)
        trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, global_step=first, loggers=[])
        callback.on_train_start(trainer, None)
        while trainer.global_step < last:
            callback.on_train_batch_start(trainer, None, batch(), 0)
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, None, None, batch(), 0)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]
