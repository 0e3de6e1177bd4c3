"""Old names in configs, flags and run folders: understood, or refused in one line with the new one."""

import importlib
import logging

import pytest
import yaml

from longrl.commands.main import main
from longrl.commands.renamed import OPTIONS, PATHS, current_arguments, current_names
from longrl.commands.run_config import read_run_config
from tests.runs import arguments, checkpoint, config, metrics, run

OLD_ENGINE = "longrl.rollout.engine.HFEngine"


@pytest.mark.parametrize("new", PATHS.values())
def test_every_new_path_is_there(new):
    module, _, name = new.rpartition(".")
    try:
        importlib.import_module(new)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), name)


def test_paths_and_options_are_replaced_wherever_they_are():
    old = {"a": [{"freeze_tower": True, "engine": {"class_path": "longrl.rollout.vllm_engine.VLLMEngine"}}]}
    assert current_names(old) == {
        "a": [{"freeze_vision_encoder": True, "engine": {"class_path": "longrl.engines.vllm.VLLMEngine"}}]
    }
    assert current_names("longrl.datamodules.published.canonical_row") == "longrl.datamodules.rows.canonical_row"
    for new in ("longrl.datamodules.rows.lmms_eval_row", "longrl.engines.hf.HFEngine", "my.rows", 3, None):
        assert current_names(new) == new


def test_flags_are_replaced_and_their_values():
    old = ["fit", "--model.family.init_args.freeze_tower=false", "--rollout.engine", OLD_ENGINE, "--rollout.max_gap=1"]
    assert current_arguments(old) == [
        "fit", "--model.family.init_args.freeze_vision_encoder=false", "--rollout.engine", "longrl.engines.hf.HFEngine",
        "--rollout.max_mismatch=1",
    ]  # fmt: skip


def test_an_old_name_is_said_once(caplog):
    from longrl.commands import renamed

    renamed._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        current_names([OLD_ENGINE, OLD_ENGINE])
    assert [record.message for record in caplog.records] == [
        f"{OLD_ENGINE} is now longrl.engines.hf.HFEngine; the old name works for one release"
    ]


# ---- the rollout callback among trainer.callbacks ----


@pytest.mark.parametrize("option", ["sampling.num_generations", "reward", "engine.init_args.urls", "max_refills"])
def test_an_option_of_the_last_callback_is_refused_with_its_new_name(option):
    flag, new = f"--trainer.callbacks.init_args.{option}", option.replace("max_refills", "max_resample_rounds")
    with pytest.raises(ValueError, match=rf"trainer.callbacks.init_args.{new} is now rollout.{new}; write --rollout"):
        main(["fit", flag, "1"])


def test_other_callbacks_keep_their_options_by_position():
    assert current_arguments(["--trainer.callbacks.init_args.every_n_steps=5"])


def as_before(values):
    """The config with the names of the release before."""
    rollout, family = values.pop("rollout"), values["model"]["family"]["init_args"]
    rollout = {name if name != "max_resample_rounds" else "max_refills": value for name, value in rollout.items()}
    callback = {"class_path": "longrl.callbacks.rollout.RolloutCallback", "init_args": {**rollout, "max_gap": 0.5}}
    values["trainer"]["callbacks"].append(callback)
    family["freeze_tower"] = True
    return values


def test_a_users_config_with_the_callback_in_the_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer.callbacks.init_args.X is now rollout.X; move its init_args"):
        main(arguments(tmp_path / "run", as_before(config("rl"))))


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A run whose config.yaml has the form and the names of the release before, with keys of that time."""
    values = config("rl")
    values["trainer"]["max_steps"] = 1
    folder = run(tmp_path_factory.mktemp("old") / "run", values)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**as_before(yaml.safe_load(file.read_text())), "policy": "causal"}))
    return folder


def test_the_config_of_an_old_run_is_read_in_todays_form(old_run):
    found = read_run_config(str(old_run))
    assert found["rollout"]["sampling"]["num_generations"] == 2
    assert found["rollout"]["max_resample_rounds"] == 20
    assert found["model"]["family"]["init_args"]["freeze_vision_encoder"]
    assert [item["class_path"] for item in found["trainer"]["callbacks"]] == [
        "longrl.callbacks.throughput.Throughput", "tests.runs.DataOrder"
    ]  # fmt: skip
    assert "policy" not in found


def test_an_old_run_goes_on_from_its_own_config(old_run, tmp_path):
    checkpoint_flag = f"--ckpt_path={old_run / 'checkpoints' / 'last.ckpt'}"
    args = ["fit", "--config", str(old_run / "config.yaml"), f"--run_dir={tmp_path}", "--trainer.max_steps=2"]
    main([*args, checkpoint_flag])
    assert checkpoint(tmp_path)["global_step"] == 2
    assert (1, "rollout/completion_tokens") in metrics(tmp_path)


def test_an_old_run_is_exported_and_planned(old_run, tmp_path):
    main(["export", f"--run={old_run}", f"--out={tmp_path / 'model'}"])
    assert (tmp_path / "model" / "config.json").exists()
    main(["plan", f"--config={old_run / 'config.yaml'}", f"--json={tmp_path / 'plan.json'}"])


def test_every_old_option_is_gone():
    """Else the table would rename a name of today."""
    assert not OPTIONS.keys() & set(OPTIONS.values())
