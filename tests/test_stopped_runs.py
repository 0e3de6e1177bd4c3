"""A run that a signal asks to end saves, says how to go on, exits with 75 and ends as the uninterrupted one."""

import copy
import json
import os
import signal
import time

import pytest
from lightning.pytorch import Callback

from longrl.io.exit_codes import STOPPED
from tests.runs import checkpoint, data_order, metrics, run, run_in_child, text_config
from tests.test_resume import differences

STEPS = 9


def values(tmp_path, **checkpoint_options):
    """3 epochs of 3 steps on text, validation at each one's end, no checkpoint before the last step."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(6)))
    found = text_config(rows)
    found["trainer"]["max_epochs"] = 3
    found["data"]["val"] = str(rows)
    found["checkpoint"] = {"every_n_train_steps": 1000, **checkpoint_options}
    return found


class AskedInSetup(Callback):
    def setup(self, trainer, pl_module, stage):
        os.kill(os.getpid(), signal.SIGTERM)


class SlowStep(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.step:
            self.happens()

    def happens(self):
        time.sleep(30)


class FailingStep(SlowStep):
    def happens(self):
        raise RuntimeError("the engine died")


def asked(config, step, where, sends="SIGTERM"):
    config = copy.deepcopy(config)
    kill = {"class_path": "tests.runs.Kill", "init_args": {"step": step, "where": where, "sends": sends}}
    config["trainer"]["callbacks"].append(kill)
    return config


def assert_same_end(folder, reference):
    assert data_order(folder) == data_order(reference)
    assert metrics(folder) == metrics(reference)
    assert differences(checkpoint(folder), checkpoint(reference)) == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder / "run", values(folder))


def test_it_stops_after_the_step_wherever_the_signal_arrives_and_goes_on_bit_equal(tmp_path, reference, capfd):
    """In a step, in the last one of an epoch, at the end of validation, and right after it."""
    config = values(tmp_path)
    folder = tmp_path / "run"
    moments = [
        (1, "on_train_batch_start", "SIGTERM"),
        (3, "on_train_batch_end", "SIGHUP"),
        (6, "on_validation_batch_end", "SIGINT"),
        (7, "on_train_batch_end", "SIGUSR1"),
    ]
    for step, where, sends in moments:
        status = run_in_child(folder, asked(config, step, where, sends), "--resume=auto")
        assert status == STOPPED, (step, where)
    assert [step for step, *_ in data_order(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]
    told = [line for line in capfd.readouterr().err.splitlines() if "stopped at step" in line]
    assert [line.split()[1:5] for line in told] == [
        ["SIGTERM:", "stopped", "at", "step"],
        ["SIGHUP:", "stopped", "at", "step"],
        ["SIGINT:", "stopped", "at", "step"],
        ["SIGUSR1:", "stopped", "at", "step"],
    ]
    assert f"at step 2; checkpoint: {folder}/checkpoints/last.ckpt; go on by: python -m longrl fit" in told[0]
    assert told[0].endswith("--resume=auto")
    run(folder, config, "--resume=auto")
    assert_same_end(folder, reference)


def test_with_shards_every_step_is_logged_and_none_has_waited_since_the_machine_started(tmp_path):
    config = values(tmp_path)
    strategy = "longrl.strategies.mr_sp.MRSPStrategy"
    config["trainer"] |= {"devices": 1, "strategy": strategy, "max_epochs": 2}
    folder = tmp_path / "run"
    assert run_in_child(folder, asked(config, 2, "on_train_batch_end"), "--resume=auto") == STOPPED
    assert run_in_child(folder, config, "--resume=auto") == 0
    logged = metrics(folder, timings=True)
    assert [step for step, name in logged if name == "train/loss"] == [0, 1, 2, 3, 4, 5]
    assert all(0 <= float(value) < 3600 for (_, name), value in logged.items() if name.startswith("time/"))


def test_in_the_last_step_it_ends_as_ever(tmp_path, reference):
    folder = tmp_path / "run"
    assert run_in_child(folder, asked(values(tmp_path), 9, "on_train_batch_end")) == 0
    assert differences(checkpoint(folder)["state_dict"], checkpoint(reference)["state_dict"]) == []


def test_before_the_first_step_it_ends_at_once(tmp_path, capfd):
    config = values(tmp_path)
    config["trainer"]["callbacks"].append({"class_path": "tests.test_stopped_runs.AskedInSetup"})
    assert run_in_child(tmp_path / "run", config) == 128 + signal.SIGTERM
    errors = capfd.readouterr().err
    assert "longrl: SIGTERM: `fit` is interrupted" in errors
    assert "Traceback" not in errors


def test_a_step_that_takes_too_long_is_abandoned_and_the_last_checkpoint_stays(tmp_path, capfd):
    config = values(tmp_path, every_n_train_steps=2, stop_within_s=0.2)
    config = asked(config, 3, "on_train_batch_start", "SIGUSR1")
    config["trainer"]["callbacks"].append({"class_path": "tests.test_stopped_runs.SlowStep", "init_args": {"step": 3}})
    assert run_in_child(tmp_path / "run", config) == STOPPED
    assert checkpoint(tmp_path / "run")["global_step"] == 2
    assert "stop_within_s=0.2 and is abandoned; checkpoint: " in capfd.readouterr().err


def test_an_error_that_the_signal_caused_in_the_step_ends_it_alike(tmp_path, capfd):
    """A worker, or the engine's process, was sent the signal too."""
    config = asked(values(tmp_path, every_n_train_steps=2), 3, "on_train_batch_start")
    config["trainer"]["callbacks"].append(
        {"class_path": "tests.test_stopped_runs.FailingStep", "init_args": {"step": 3}}
    )
    assert run_in_child(tmp_path / "run", config) == STOPPED
    assert checkpoint(tmp_path / "run")["global_step"] == 2
    assert "SIGTERM: the step failed and is abandoned (the engine died); checkpoint: " in capfd.readouterr().err


def test_minutes_count_beside_steps(tmp_path):
    config = values(tmp_path, every_n_train_steps=4, every_n_minutes=1e-6)
    folder = tmp_path / "run"
    assert run_in_child(folder, asked(config, 3, "on_train_batch_end", "SIGKILL")) == -signal.SIGKILL
    assert checkpoint(folder)["global_step"] == 2
    config["checkpoint"]["every_n_minutes"] = 0
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_minutes must be above 0, got 0"):
        run(tmp_path / "other", config)
