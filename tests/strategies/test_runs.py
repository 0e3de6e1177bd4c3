"""Whole runs over several ranks, through the command line: rewards, checkpoints, resuming, and what goes wrong."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback

from longrl.commands.main import main
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.initial_weights import build_from
from tests.distributed import ForkedCommand, run_distributed
from tests.runs import ROOT, arguments, config, metrics, rollouts, run, session_members, videos

LAST = "checkpoints/last.ckpt"


def grid(values: dict[str, Any], devices: int, sp: int | str, steps: int, **strategy: Any) -> dict[str, Any]:
    """The same run on other devices: 4 prompts per step over all teams."""
    values = copy.deepcopy(values)
    sp_group = devices if sp == "auto" else sp
    values["trainer"] |= {
        "devices": devices,
        "max_steps": steps,
        "strategy": {
            "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
            "init_args": {"sequence_parallel_size": sp, "timeout_s": 600.0, **strategy},
        },
    }
    values["trainer"]["callbacks"] = [c for c in values["trainer"]["callbacks"] if "DataOrder" not in c["class_path"]]
    values["data"]["prompts_per_batch"] = 4 * sp_group // devices
    values["data"]["eval_prompts_per_batch"] = 4
    values["checkpoint"] = {"every_n_train_steps": 2}
    return values


def rl() -> dict[str, Any]:
    """6 steps in 2 epochs, KL, validation on 3 rows one by one: one of two ranks has none in the last batch.

    Rows follow their pass rates, and frames and lengths the optimizer steps.
    """
    values = config("rl", freeze_vision_encoder=False)
    lengths = {"steps": [0, 6], "values": [4, 5]}
    values["rollout"] = rollouts(sampling={"num_generations": 3, "max_completion_tokens": 5}, length_schedule=lengths)
    values["data"]["curriculum"] = {
        "pass_rates": {"high": 0.9, "weight": "failure", "pass_share": 0.5, "retry_after": 2},
        "video": {"max_frames": {"steps": [0, 4], "values": [4, 768]}},
    }
    # The first mini-batches have something to learn from: else Adam would take rounding for gradients.
    values["data"]["seed"] = 8
    values["trainer"] |= {"val_check_interval": 3, "max_epochs": 9}
    values["model"]["algorithm"] = {"kl_coef": 0.1}
    values["model"] |= {"mini_batches_per_rollout": 2, "optimizer": {"lr": 1e-3}}
    values["data"] |= {"val": str(videos() / "eval.jsonl"), "max_eval_rows": 3, "eval_prompts_per_batch": 1}
    return values


def everywhere(values: dict[str, Any], devices: int, folder: Path, *more: str) -> Path:
    run_distributed(run, devices, folder, values, *more)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    family = Qwen2_5_VLFamily(**config()["model"]["family"]["init_args"])
    return build_from(family, str(folder)).state_dict()


def assert_same_run(found: Path, wanted: Path, first_step: int = 0) -> None:
    """Metrics within rounding, and weights within a thousandth of what Adam can move them in a step."""
    logged = {key: float(value) for key, value in metrics(wanted).items() if key[0] >= first_step}
    ours = {key: float(value) for key, value in metrics(found).items() if key[0] >= first_step}
    assert ours.keys() == logged.keys()
    for key, value in logged.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    other = weights(wanted)
    for name, value in weights(found).items():
        assert float((value - other[name]).abs().max()) < 1e-4, name


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Without the strategy, in one process."""
    values = grid(rl(), 1, 1, 12)
    del values["trainer"]["strategy"]
    return run(tmp_path_factory.mktemp("one") / "run", values)


@pytest.mark.parametrize(("devices", "sp"), [(1, 1), (2, 2), (2, 1), (4, 2), (2, "auto")])
def test_a_run_over_ranks_is_the_run_of_one(tmp_path, one_rank, devices, sp):
    assert_same_run(everywhere(grid(rl(), devices, sp, 12), devices, tmp_path / "run"), one_rank)


def longrl(*args: str) -> None:
    with mock.patch.object(sys, "argv", ["longrl", *args]):
        main(list(args))


@pytest.mark.slow
def test_the_demos_rl_stage_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    longrl("synthetic", f"--out={tmp_path / 'data'}", "--num_train_videos=40", "--num_eval_videos=1", "--fps=2")
    reward = tmp_path / "reward.yaml"  # one that the base model meets now and then
    reward.write_text("terms: [{function: tests.runs.rare}]")
    stage = ["--config", "configs/demo/common.yaml", "--config", "configs/demo/grpo.yaml"]
    stage += [f"--data.train={tmp_path / 'data' / 'train.jsonl'}", "--model.init_from=configs/demo/base"]
    stage += ["--trainer.max_steps=3", "--data.prompts_per_batch=8", f"--rollout.reward={reward}"]
    longrl("fit", *stage, f"--run_dir={tmp_path / 'one'}")
    strategy = ["--trainer.devices=2", "--trainer.strategy=longrl.strategies.mr_sp.MRSPStrategy"]
    strategy += ["--trainer.strategy.sequence_parallel_size=2", f"--run_dir={tmp_path / 'two'}"]
    run_distributed(longrl, 2, "fit", *stage, *strategy)
    rewards = [[value for (_, name), value in metrics(tmp_path / run).items() if name == "reward/mean"] for run in PAIR]
    assert rewards[0] == rewards[1]
    assert any(float(value) > 0 for value in rewards[0])
    one, two = (build_from(Qwen2_5_VLFamily("configs/demo/base"), str(tmp_path / run)).state_dict() for run in PAIR)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


PAIR = ("one", "two")


@pytest.mark.parametrize("sharding", [{"compute_dtype": "bfloat16"}, {"offload": True}])
def test_precision_and_offload(tmp_path, one_rank, sharding):
    folder = everywhere(grid(rl(), 2, 2, 2, sharding=sharding), 2, tmp_path / "run")
    wanted, found = (float(metrics(run)[0, "train/grad_norm"]) for run in (one_rank, folder))
    assert found == pytest.approx(wanted, rel=1e-4 if "offload" in sharding else 0.1)
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


def test_a_run_saved_on_4_ranks_goes_on_on_2_and_on_1(tmp_path, one_rank):
    folder = everywhere(grid(rl(), 4, 2, 4), 4, tmp_path / "run")
    resume = f"--ckpt_path={folder / LAST}"
    everywhere(grid(rl(), 2, 2, 8), 2, folder, resume)
    everywhere(grid(rl(), 1, 1, 12), 1, folder, resume)
    assert_same_run(folder, one_rank)


@pytest.mark.slow
def test_what_moves_from_step_to_step_goes_on_on_another_number_of_ranks(tmp_path):
    """Coefficients, deviations of tasks and the reference, of 2 ranks that share sequences and then of one."""
    values = rl()
    del values["data"]["val"]
    values["model"]["algorithm"] = MOVING
    alone = grid(values, 1, 1, 6)
    del alone["trainer"]["strategy"]
    one = run(tmp_path / "one", alone)
    folder = everywhere(grid(values, 2, 2, 4), 2, tmp_path / "run")
    everywhere(grid(values, 1, 1, 6), 1, folder, f"--ckpt_path={folder / LAST}")
    assert_same_run(folder, one)
    logged = metrics(one)
    for name in ("kl_coef", "entropy_coef", "task_std/multiple_choice", "kl_ref"):
        assert len({value for (_, metric), value in logged.items() if metric == f"train/{name}"}) > 1, name


MOVING = {
    "advantage": {"class_path": "longrl.algorithms.TaskNormalized", "init_args": {"decay": 0.5}},
    "kl_coef": 0.1,
    "kl_control": {"target": 1e-3, "horizon": 30},
    "moving_reference": {"alpha": 0.5, "every_n_steps": 1},
    "entropy_coef": 0.1,
    "entropy_control": {"target": 100.0, "step": 0.05},
}


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_on_two_ranks_and_its_shards_on_one(tmp_path, one_rank):
    """A single file is read by ranks that shard, and their shards by one rank under the strategy."""
    values = grid(rl(), 1, 1, 4)
    del values["trainer"]["strategy"]
    folder = run(tmp_path / "run", values)
    assert (folder / LAST).is_file()
    resume = f"--ckpt_path={folder / LAST}"
    everywhere(grid(rl(), 2, 1, 8), 2, folder, resume)
    assert (folder / LAST).is_dir()
    values["trainer"]["max_steps"] = 12
    with pytest.raises(ValueError, match=r"several ranks.*MRSPStrategy"):
        run(folder, values, resume)
    everywhere(grid(rl(), 1, 1, 12), 1, folder, resume)
    assert_same_run(folder, one_rank)


@pytest.mark.slow
def test_one_file_of_two_ranks_goes_on_without_the_strategy(tmp_path, one_rank):
    folder = everywhere(grid(rl(), 2, 2, 4, save_distributed_checkpoint=False), 2, tmp_path / "run")
    moved = folder.rename(tmp_path / "elsewhere")
    values = grid(rl(), 1, 1, 12)
    del values["trainer"]["strategy"]
    run(moved, values, f"--ckpt_path={moved / LAST}")
    assert_same_run(moved, one_rank)


def test_one_file_for_all_ranks(tmp_path, one_rank):
    values = grid(rl(), 2, 2, 4, save_distributed_checkpoint=False)
    folder = everywhere(values, 2, tmp_path / "run")
    assert (folder / LAST).is_file()
    everywhere(grid(rl(), 2, 2, 12, save_distributed_checkpoint=False), 2, folder, f"--ckpt_path={folder / LAST}")
    assert_same_run(folder, one_rank)


def test_a_run_killed_while_it_renames_has_its_last_checkpoint(tmp_path, one_rank):
    folder = everywhere(grid(rl(), 2, 2, 4), 2, tmp_path / "run")
    (folder / LAST).rename((folder / LAST).with_name(".last.ckpt.before"))
    everywhere(grid(rl(), 2, 2, 12), 2, folder, f"--ckpt_path={folder / LAST}")
    assert_same_run(folder, one_rank)
    assert not (folder / LAST).with_name(".last.ckpt.before").exists()
    shutil.rmtree(folder)


# ---- what goes wrong ----


class Break(Callback):
    """One rank fails, or is killed, in its third step."""

    def __init__(self, rank: int, kill: bool) -> None:
        self.rank, self.kill = rank, kill

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step >= 2:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank is broken")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "kill"), [(0, False), (1, False), (1, True)])
def test_a_rank_that_dies_ends_the_others(tmp_path, rank, kill):
    values = grid(rl(), 2, 2, 12)
    breaks = {"class_path": "tests.strategies.test_runs.Break", "init_args": {"rank": rank, "kill": kill}}
    values["trainer"]["callbacks"].append(breaks)
    process = ForkedCommand(*arguments(tmp_path / "run", values))
    output = process.wait()
    assert process.returncode != 0
    if not kill:
        assert "this rank is broken" in output
        name = f"rank{rank}.traceback.txt" if rank else "traceback.txt"
        assert f"the traceback is in {tmp_path / 'run' / name}" in output
    assert not session_members(process.pid)


def test_two_nodes_on_loopback(tmp_path, one_rank):
    """`launch/torchrun.sh` on each; weights sharded inside nodes, gradients summed over them."""
    args = arguments(tmp_path / "run", grid(rl(), 2, 1, 12, num_replicas=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"NNODES": "2", "DEVICES": "1", "MASTER_PORT": str(port), "PYTHON": sys.executable}
    nodes = [
        subprocess.Popen(
            [ROOT / "launch" / "torchrun.sh", *args],
            env={**os.environ, **settings, "NODE_RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert_same_run(tmp_path / "run", one_rank)
