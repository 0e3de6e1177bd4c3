"""`fit --profile`: what one step leaves, and that nothing is left of a step that fails."""

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity

from longrl.callbacks import step_profile
from longrl.callbacks.step_profile import StepProfile
from tests.runs import run, text_config


@pytest.fixture
def values(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n' * 8)
    found = text_config(tmp_path / "rows.jsonl", "rl")
    found["trainer"] |= {"max_steps": 4}
    found["rollout"]["max_resample_rounds"] = 0
    return found


def test_one_step_with_all_its_phases_is_profiled(tmp_path, values):
    folder = run(tmp_path / "run", values, f"--profile={tmp_path / 'profile'}")
    written = tmp_path / "profile" / "rank0"
    assert sorted(path.name for path in written.iterdir()) == ["operators.txt", "trace.json.gz"]
    with gzip.open(written / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [names.count(phase) for phase in ("generate", "reward", "update")] == [1, 1, 1]
    assert "aten::mm" in names
    assert "aten::" in (written / "operators.txt").read_text()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["profile"] is None


def test_a_run_without_such_a_step_says_so(tmp_path, values, caplog):
    values["trainer"]["max_steps"] = 2
    run(tmp_path / "run", values, f"--profile={tmp_path / 'profile'}")
    assert "the run ended after 2 steps, and step 2, counted from 0, would have been profiled" in caplog.text
    assert not any((tmp_path / "profile").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_built(tmp_path, values):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--profile=\S*file/profile cannot be written"):
        run(tmp_path / "run", values, f"--profile={tmp_path / 'file' / 'profile'}")


class Profiler:
    def __init__(self, log, activities):
        self.log = log
        log.append(sorted(activity.name for activity in activities))

    def start(self):
        self.log.append("start")

    def stop(self):
        self.log.append("stop")


@pytest.fixture
def log(monkeypatch):
    """What a machine with a GPU is asked for."""
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: log.append(options))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profiler(log, activities))
    monkeypatch.setattr(step_profile, "write_profile", lambda profiler, folder: (folder / "written").touch())
    return log


ON_A_GPU = [{"max_entries": step_profile.MEMORY_EVENTS}, ["CPU", "CUDA"], "start", "stop", {"enabled": None}]


def test_kernels_and_memory_of_a_gpu_are_recorded_in_that_step_alone(tmp_path, log, caplog):
    callback = StepProfile(str(tmp_path), step=1)
    trainer = SimpleNamespace(global_rank=3)
    with caplog.at_level(logging.INFO, logger="longrl"):
        for number in range(4):
            callback.on_train_batch_start(trainer, None, None, number)
            assert (len(log) == 3) == (number == 1)
            callback.on_train_batch_end(trainer, None, None, None, number)
    assert log == ON_A_GPU
    assert (tmp_path / "rank3" / "written").exists()
    assert f"the profile of step 1 is in {tmp_path / 'rank3'}" in caplog.text


def test_an_earlier_profile_is_kept(tmp_path, log):
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "mine").touch()
    callback = StepProfile(str(tmp_path), step=0)
    trainer = SimpleNamespace(global_rank=0)
    callback.on_train_batch_start(trainer, None, None, 0)
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert (tmp_path / "rank0.old1" / "mine").exists()
    assert [path.name for path in (tmp_path / "rank0").iterdir()] == ["written"]


def test_a_step_that_fails_ends_the_recording(tmp_path, log):
    callback = StepProfile(str(tmp_path), step=0)
    callback.on_train_batch_start(None, None, None, 0)
    callback.on_exception(None, None, RuntimeError())
    assert log == ON_A_GPU
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_the_gpus_memory_lies_beside_the_trace(tmp_path, monkeypatch):
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())
    step_profile.write_profile(profiler, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.pickle", "operators.txt", "trace.json.gz"]
