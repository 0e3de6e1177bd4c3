"""Whole runs of flow models: they learn, resume exactly, and are the same over ranks."""

import copy
import signal
import warnings
from pathlib import Path

import pytest
import torch

from longrl.commands.diffusion import DiffusionCLI
from longrl.modules.initial_weights import read_adapters
from tests.diffusion.runs import config, run
from tests.diffusion.tiny import sd3_folder, wan_folder
from tests.distributed import run_distributed
from tests.runs import arguments, checkpoint, metrics, run_in_child
from tests.test_resume import LAST, differences, killed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
ROOT = Path(__file__).parents[2]


# ---- learning ----


@pytest.mark.parametrize(
    ("name", "folder", "rise"),
    [("sd3", sd3_folder, 0.05), ("wan", wan_folder, 0.01)],
)
def test_the_demo_learns_its_colours(name, folder, rise, tmp_path, monkeypatch):
    """The first steps of configs/demo/flow: the reward rises, far beyond what chance does."""
    from longrl.commands.main import main

    monkeypatch.chdir(ROOT)
    run_dir = tmp_path / "run"
    main([
        "diffusion", "fit", f"--config=configs/demo/flow/{name}.yaml", f"--run_dir={run_dir}", "--trainer.max_steps=30",
        f"--model.family.init_args.model={folder()}", "--trainer.val_check_interval=30",
    ])  # fmt: skip
    rewards = torch.tensor([float(value) for (_, key), value in metrics(run_dir).items() if key == "reward/mean"])
    assert len(rewards) == 30
    assert float(rewards[-5:].mean() - rewards[:5].mean()) > rise
    assert float(torch.corrcoef(torch.stack([torch.arange(30.0), rewards]))[0, 1]) > 0.6  # p < 0.001
    assert list(run_dir.glob("pictures/val_*.png"))


# ---- export ----


def test_a_run_is_exported_as_a_pipeline_and_its_adapters_for_diffusers(tmp_path, caplog):
    from diffusers import StableDiffusion3Pipeline

    from longrl.commands.export import family_of
    from longrl.commands.main import main
    from longrl.modules.initial_weights import plain_from

    values = config(tmp_path, lora={"rank": 2, "alpha": 4})
    values["trainer"]["max_steps"], values["model"]["optimizer"] = 4, {"lr": 0.03}
    folder = str(run(tmp_path / "run", values))
    expected = plain_from(family_of(folder), folder, averaged=True).state_dict()
    weights = plain_from(family_of(folder), folder).state_dict()
    start = family_of(folder).build().state_dict()
    assert any(not torch.equal(expected[name], value) for name, value in start.items())
    assert any(not torch.equal(expected[name], value) for name, value in weights.items())
    with caplog.at_level("INFO"):
        main(["export", f"--run={folder}", f"--out={tmp_path / 'raw'}", "--raw_weights=true"])
        assert "moving averages" not in caplog.text
        main(["export", f"--run={folder}", f"--out={tmp_path / 'whole'}"])
        assert "these are the moving averages (EMA) of the trained weights" in caplog.text
    raw = StableDiffusion3Pipeline.from_pretrained(tmp_path / "raw").transformer.state_dict()
    assert all(torch.equal(raw[name], value) for name, value in weights.items())
    whole = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole").transformer.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    main(["export", f"--run={folder}", f"--out={tmp_path / 'lora'}", "--adapter=true"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder())
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora()
    fused = pipeline.transformer.state_dict()
    for name, value in expected.items():
        layer = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        torch.testing.assert_close(fused.get(name, fused.get(layer)), value, rtol=1e-5, atol=1e-6)


# ---- averages ----


def averages(folder: Path) -> dict[str, torch.Tensor]:
    """The averages in a run's last checkpoint, by the names of their weights."""
    state = checkpoint(folder)["state_dict"]
    found = {name.removeprefix("ema_weights."): value for name, value in state.items() if name.startswith("ema_")}
    return {f"model.{name.replace('/', '.')}": value for name, value in found.items()}


def test_validation_reads_the_averages_and_training_the_weights(reference, tmp_path):
    """`validate` of the last checkpoint gives the reward that the run had there, and another one without averages."""
    values = config(tmp_path)
    values["data"] |= {name: checkpoint_prompts(reference) for name in ("train", "val")}
    found = {}
    for name, ema in {"averages": values["model"]["ema"], "weights": None}.items():
        values["model"]["ema"] = ema
        args = arguments(tmp_path / name, values, f"--ckpt_path={reference / LAST}", command="validate")
        found[name] = float(DiffusionCLI.run(args).trainer.callback_metrics["val/reward"])
    last = max(step for step, name in metrics(reference) if name == "val/reward")
    assert found["averages"] == pytest.approx(float(metrics(reference)[last, "val/reward"]), abs=1e-7)
    assert abs(found["weights"] - found["averages"]) > 1e-5


def test_a_run_without_averages_goes_on_with_them_and_the_other_way_round(tmp_path):
    values = config(tmp_path, lora={"rank": 2, "alpha": 4})
    values["trainer"] |= {"max_steps": 4, "val_check_interval": 9}
    every = values["model"].pop("ema") | {"every_n_steps": 100}
    folder = run(tmp_path / "run", values)
    before = checkpoint(folder)["state_dict"]
    assert averages(folder) == {}
    for steps, ema in ((8, every), (12, None)):
        values["trainer"]["max_steps"], values["model"]["ema"] = steps, ema
        run(folder, values, f"--ckpt_path={folder / LAST}")
        found = averages(folder)
        assert set(found) == ({name for name in before if ".lora_" in name} if ema else set())
        assert all(torch.equal(value, before[name]) for name, value in found.items())  # no update is due yet
    assert checkpoint(folder)["global_step"] == 12


def with_objective(values, name):
    """The run with an objective on samples of the ODE, whose old policy lags behind; None leaves it Flow-GRPO's."""
    if name is not None:
        init_args = {"num_times": 4, "times_per_sample": 2}
        if name == "DiffusionNFT":
            init_args["old"] = {"decay_per_step": 0.5, "max_decay": 0.9}
        values["model"] |= {
            "objective": {"class_path": f"longrl.diffusion.objectives.{name}", "init_args": init_args},
            "algorithm": {},
        }
        values["rollout"]["sampling"]["window"] = None
    return values


def resumed_over_ranks(folder: Path, values) -> None:
    """A step without averages, then two with them; the second of these once more from the checkpoint before."""
    old = copy.deepcopy(values)
    old["trainer"]["max_steps"] = 1
    old["model"]["ema"] = None
    if "objective" in old["model"]:
        old = with_objective(old, "DiffusionDPO")
    run(folder / "old", old)
    run(folder / "whole", values, f"--ckpt_path={folder / 'old' / LAST}")
    (second,) = (folder / "whole").glob("checkpoints/*step=2.ckpt")
    run(folder / "resumed", values, f"--ckpt_path={second}")


@pytest.mark.parametrize("objective", [None, "DiffusionNFT"])
def test_shards_of_averages_resume_to_the_last_bit_and_are_exported(tmp_path, objective):
    values = with_objective(on_ranks(config(tmp_path, lora={"rank": 2, "alpha": 4}), 2, 1, 1), objective)
    values["trainer"] |= {"val_check_interval": 9}
    values["model"] |= {"mini_batches_per_rollout": 1, "epochs_per_rollout": 1, "ema": {"every_n_steps": 1}}
    values["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1}
    run_distributed(resumed_over_ranks, 2, tmp_path, values)
    weights, means = (
        [read_adapters(str(tmp_path / name), averaged=averaged) for name in ("old", "whole", "resumed")]
        for averaged in (False, True)
    )
    assert same(means[0], weights[0])  # it has none
    assert same(weights[1], weights[2])
    assert same(means[1], means[2])
    assert not same(means[1], weights[1])


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- resuming ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("flow") / "run", config(tmp_path_factory.mktemp("prompts")))
    assert checkpoint(folder)["global_step"] == 16
    assert len({step for step, name in metrics(folder) if name == "reward/mean"}) == 4
    assert {name for _, name in metrics(folder)} >= {"val/reward", "train/kl_ref", "train/mismatch_max"}
    assert len({value for (_, name), value in metrics(folder).items() if name == "train/kl_coef"}) == 4
    return folder


@pytest.mark.parametrize("kills", [[(4, "saved"), (12, "on_train_batch_end")]])
def test_a_killed_run_goes_on_as_if_it_never_had_been(tmp_path, reference, kills):
    values, folder = config(tmp_path), tmp_path / "run"
    values["data"] |= {name: checkpoint_prompts(reference) for name in ("train", "val")}
    for step, where in kills:
        more = [f"--ckpt_path={folder / LAST}"] if (folder / LAST).exists() else []
        assert run_in_child(folder, killed(values, step, where), *more, command="diffusion fit") == -signal.SIGKILL
    run(folder, values, f"--ckpt_path={folder / LAST}")
    assert metrics(folder) == metrics(reference)
    assert differences(checkpoint(folder), checkpoint(reference)) == []


@pytest.mark.parametrize("objective", [None, "DiffusionNFT"])
def test_a_run_with_more_prompts_than_a_batch_holds_resumes_to_the_last_bit(tmp_path, objective):
    """Batches cross epochs of 3 prompts, and the resumed run's cache of conditions is empty."""
    values = with_objective(config(tmp_path), objective)
    values["data"] |= {"train": str(tmp_path / "three.txt"), "val": str(tmp_path / "three.txt")}
    (tmp_path / "three.txt").write_text("a red picture\na green picture\na small cat\n")
    values["trainer"] |= {"max_steps": 6, "val_check_interval": 1}
    values["model"] |= {"mini_batches_per_rollout": 2, "epochs_per_rollout": 1}
    values["checkpoint"]["every_n_train_steps"] = 2
    whole, folder = run(tmp_path / "whole", values), tmp_path / "run"
    assert run_in_child(folder, killed(values, 4, "saved"), command="diffusion fit") == -signal.SIGKILL
    run(folder, values, f"--ckpt_path={folder / LAST}")
    assert metrics(folder) == metrics(whole)
    assert differences(checkpoint(folder), checkpoint(whole)) == []
    state = checkpoint(folder)["state_dict"]
    assert any(name.startswith("old_weights.") for name in state) == (objective is not None)


def checkpoint_prompts(reference: Path) -> str:
    import yaml

    return yaml.safe_load((reference / "config.yaml").read_text())["data"]["train"]


# ---- ranks ----


def on_ranks(values, devices, sp, prompts_per_batch):
    values = copy.deepcopy(values)
    values["trainer"] |= {
        "devices": devices,
        "max_steps": 3,
        "strategy": {
            "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
            "init_args": {"sequence_parallel_size": sp, "timeout_s": 600.0},
        },
    }
    values["data"]["prompts_per_batch"] = prompts_per_batch
    return values


def run_without_warnings(folder, values):
    """A run that Lightning does not ask to synchronise what is the same on all ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*sync_dist")
        return run(folder, values)


def same_run(found: Path, wanted: Path) -> None:
    ours, theirs = metrics(found), metrics(wanted)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key[1].startswith("train/mismatch"):
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
    values["model"] |= {"mini_batches_per_rollout": 1, "rows_per_micro_batch": 8}
    alone = copy.deepcopy(values)
    alone["trainer"]["max_steps"] = 3
    run(tmp_path / "one", alone)
    run_distributed(run_without_warnings, devices, tmp_path / "many", on_ranks(values, devices, sp, 2 * sp // devices))
    same_run(tmp_path / "many", tmp_path / "one")
