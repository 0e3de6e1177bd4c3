"""Two ranks that Lightning starts: stopped together by a signal to one of them, and no success if one of them fails."""

import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback

from longrl.commands.ranks import is_first_rank, stop_ranks, take_ranks, wait_for_ranks
from longrl.io.exit_codes import STOPPED
from tests.distributed import ForkedCommand
from tests.runs import arguments, text_config


class FailsOnRank1(Callback):
    """Raises where no other rank waits for it any more."""

    def teardown(self, trainer, pl_module, stage):
        if os.environ.get("LOCAL_RANK", "0") == "1":
            raise RuntimeError("rank 1 failed")


def values(tmp_path, *callbacks):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(8)))
    found = text_config(rows)
    strategy = {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": {"timeout_s": 600.0}}
    found["trainer"] |= {"devices": 2, "strategy": strategy, "callbacks": [{"class_path": name} for name in callbacks]}
    found["checkpoint"] = {"every_n_train_steps": 1000}
    return found


@pytest.mark.slow
def test_a_signal_to_the_command_stops_both_ranks_with_a_checkpoint(tmp_path):
    config = values(tmp_path)
    config["trainer"]["max_steps"] = 100_000
    folder = tmp_path / "run"
    process = ForkedCommand(*arguments(folder, config, "--resume=auto"))
    try:
        deadline = time.monotonic() + 600
        while sum(file.read_text().count("\n") for file in folder.glob("logs/*/metrics.csv")) < 3:
            assert process.returncode is None, process.output()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.wait()
    finally:
        process.kill()
    assert process.returncode == STOPPED, output
    assert "longrl: SIGTERM: stopped at step " in output
    assert "Traceback" not in output
    assert (folder / "checkpoints" / "last.ckpt" / "meta.pt").is_file()


@pytest.mark.slow
def test_a_rank_that_fails_last_is_no_success(tmp_path):
    config = values(tmp_path, "tests.strategies.test_stopped_ranks.FailsOnRank1")
    config["trainer"]["max_steps"] = 1
    process = ForkedCommand(*arguments(tmp_path / "run", config))
    output = process.wait()
    assert process.returncode not in (0, None), output
    assert "rank 1 failed" in output


class Ended:
    def __init__(self, code):
        self.code, self.is_killed = code, False

    def wait(self, timeout):
        return self.code

    def kill(self):
        self.is_killed = True


def test_the_ranks_that_failed_are_named():
    assert wait_for_ranks([]) is None
    assert wait_for_ranks([Ended(0), Ended(0)]) is None
    assert wait_for_ranks([Ended(0), Ended(-9)]) == "rank 2 ended with exit code -9"


def test_ranks_that_are_waited_for_are_no_more_observed_by_lightning():
    failed, stuck = subprocess.Popen(["false"]), subprocess.Popen(["sleep", "60"])
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[failed, stuck])))
    observer = _ChildProcessObserver(main_pid=0, child_processes=trainer.strategy.launcher.procs)
    assert take_ranks(trainer) == [failed, stuck]
    failed.wait()
    assert observer._run() is True
    assert stuck.poll() is None
    stuck.kill()
    assert take_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []


def test_ranks_of_a_run_that_has_failed_are_ended_by_force_if_need_be(monkeypatch):
    monkeypatch.setattr("longrl.commands.ranks.STOP_WITHIN_S", 0.1)
    stuck = subprocess.Popen(["sleep", "60"])
    stop_ranks([stuck])
    assert stuck.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "LOCAL_RANK": "3"}, False),  # started from an interactive job
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, True),  # torchrun below srun
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
    ],
)
def test_one_process_of_all_writes(monkeypatch, environment, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() is first
