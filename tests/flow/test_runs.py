"""Whole runs of flow models: they learn, resume exactly, and are the same over ranks."""

import copy
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.flow.runs import config
from tests.flow.tiny import sd3_folder, wan_folder
from tests.runs import checkpoint, metrics, run, run_in_child
from tests.test_resume import LAST, differences, killed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
ROOT = Path(__file__).parents[2]


# ---- learning ----


@pytest.mark.parametrize(
    ("name", "folder", "options"),
    [("sd3", sd3_folder, []), ("wan", wan_folder, [])],
)
def test_the_demo_learns_its_colours(name, folder, options, tmp_path, monkeypatch):
    """The first steps of configs/demo/flow: the reward rises by many standard errors."""
    from longrl.cli import main

    monkeypatch.chdir(ROOT)
    run_dir = tmp_path / "run"
    main([
        "fit", f"--config=configs/demo/flow/{name}.yaml", f"--run_dir={run_dir}", "--trainer.max_steps=24",
        f"--model.family.init_args.model={folder()}", "--trainer.val_check_interval=24", *options,
    ])  # fmt: skip
    rewards = torch.tensor([float(value) for (_, key), value in metrics(run_dir).items() if key == "reward/mean"])
    first, last = rewards[:4], rewards[-4:]
    error = (first.var() / 4 + last.var() / 4).sqrt()
    assert len(rewards) == 24
    assert float(last.mean() - first.mean()) > 0.01
    assert float(last.mean() - first.mean()) > 5 * float(error)
    assert list(run_dir.glob("pictures/val_*.png"))


# ---- resuming ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("flow") / "run", config(tmp_path_factory.mktemp("prompts")))
    assert checkpoint(folder)["global_step"] == 24
    assert len({step for step, name in metrics(folder) if name == "reward/mean"}) == 6
    assert {name for _, name in metrics(folder)} >= {"val/reward", "train/kl_ref", "train/gap_max"}
    return folder


@pytest.mark.parametrize("kills", [[(8, "saved")], [(8, "on_train_batch_start"), (20, "on_train_batch_end")]])
def test_a_killed_run_goes_on_as_if_it_never_had_been(tmp_path, reference, kills):
    values, folder = config(tmp_path), tmp_path / "run"
    values["data"] |= {name: checkpoint_prompts(reference) for name in ("train", "val")}
    for step, where in kills:
        more = [f"--ckpt_path={folder / LAST}"] if (folder / LAST).exists() else []
        assert run_in_child(folder, killed(values, step, where), *more) == -signal.SIGKILL
    run(folder, values, f"--ckpt_path={folder / LAST}")
    assert metrics(folder) == metrics(reference)
    assert differences(checkpoint(folder), checkpoint(reference)) == []


def checkpoint_prompts(reference: Path) -> str:
    import yaml

    return yaml.safe_load((reference / "config.yaml").read_text())["data"]["train"]


# ---- ranks ----


def on_ranks(values, devices, sp, prompts_per_batch):
    values = copy.deepcopy(values)
    values["trainer"] |= {
        "devices": devices,
        "max_steps": 8,
        "strategy": {
            "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
            "init_args": {"sequence_parallel_size": sp, "timeout_s": 60.0},
        },
    }
    values["data"]["prompts_per_batch"] = prompts_per_batch
    return values


def same_run(found: Path, wanted: Path) -> None:
    ours, theirs = metrics(found), metrics(wanted)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key[1].startswith("train/gap"):
            assert float(ours[key]) == pytest.approx(float(value), rel=5e-3, abs=2e-4), key


@pytest.mark.parametrize(
    ("name", "devices", "sp", "family"),
    [
        ("sd3", 2, 1, {"lora": {"rank": 2, "alpha": 4}}),
        ("wan", 2, 2, {}),
    ],
)
def test_a_run_over_ranks_is_the_run_of_one(name, devices, sp, family, tmp_path):
    values = config(tmp_path, name, **family)
    values["model"] |= {"mini_batches_per_rollout": 1}
    alone = copy.deepcopy(values)
    alone["trainer"]["max_steps"] = 8
    run(tmp_path / "one", alone)
    run_distributed(run, devices, tmp_path / "many", on_ranks(values, devices, sp, 2 * sp // devices))
    same_run(tmp_path / "many", tmp_path / "one")
