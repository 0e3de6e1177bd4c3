"""What a run remembers of its metrics: curves and alerts, also over an interruption."""

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from longrl.callbacks.run_watch import RunWatch
from tests.runs import checkpoint, run, text_config


class FakeWandb(WandbLogger):
    """Notes what would be mailed."""

    def __init__(self, offline: bool) -> None:
        self.sent = []
        self._run = SimpleNamespace(offline=offline, alert=lambda *args, **options: self.sent.append((args, options)))

    @property
    def experiment(self):
        return self._run


def trainer(*loggers, is_global_zero=True):
    return SimpleNamespace(
        global_step=0, is_global_zero=is_global_zero, callback_metrics={"reward/mean": torch.tensor(0.5)},
        loggers=list(loggers),
    )  # fmt: skip


def train(watch, fake, entropies):
    watch.on_train_start(fake, None)
    for value in entropies:
        fake.global_step += 1
        fake.callback_metrics["train/entropy"] = torch.tensor(value)
        watch.on_train_batch_end(fake, None, None, None, 0)


def test_an_alert_is_a_warning_once_and_a_mail_of_an_online_run(caplog):
    online, offline = FakeWandb(False), FakeWandb(True)
    with caplog.at_level(logging.WARNING):
        train(RunWatch(), trainer(online, offline), [1.0] * 15 + [0.1] * 15)
    (record,) = caplog.records
    assert record.getMessage().startswith("entropy collapse at step 21 (train/entropy): ")
    assert "model.algorithm.clip_high" in record.getMessage()
    assert [(title, options) for (title, _), options in online.sent] == [("entropy collapse", {"level": "WARN"})]
    assert offline.sent == []


def test_batches_without_a_step_count_once_and_other_ranks_are_silent():
    watch, fake = RunWatch(), trainer()
    train(watch, fake, [1.0, 2.0])
    for _ in range(30):
        watch.on_train_batch_end(fake, None, None, None, 0)
    assert watch.curves["train/entropy"].values() == [1.0, 2.0]
    other = RunWatch()
    train(other, trainer(is_global_zero=False), [1.0] * 5)
    assert other.curves == {}


@pytest.mark.parametrize("cut", [8, 22])
def test_alerts_and_curves_go_on_after_an_interruption(cut, caplog):
    entropies = [1.0] * 15 + [0.1] * 15
    whole, first, second = RunWatch(), RunWatch(), RunWatch()
    train(whole, trainer(), entropies)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fake = trainer()
        train(first, fake, entropies[:cut])
        second.load_state_dict(first.state_dict())
        train(second, fake, entropies[cut:])
    assert len(caplog.records) == 1
    assert second.state_dict() == whole.state_dict()


def test_fit_watches_every_run_and_keeps_what_it_saw_in_checkpoints(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n' * 3)
    values = text_config(tmp_path / "rows.jsonl", "rl")
    values["trainer"] |= {"max_steps": 3, "callbacks": [{"class_path": "longrl.callbacks.run_watch.RunWatch"}]}
    values["rollout"]["max_resample_rounds"] = 0
    saved = checkpoint(run(tmp_path / "run", values))["callbacks"]["RunWatch"]
    # The listed one is moved behind the callback that logs the rewards: it knows those of the last step too.
    assert len(saved["curves"]["reward/mean"]["points"]) == 3
    assert saved["alerts"]["traces"]["train/grad_norm"][2] == 3
