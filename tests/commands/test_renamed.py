"""Old names in configs, flags and run folders: understood, or refused in one line with the new one."""

import importlib
import logging

import pytest
import yaml

from longrl.callbacks.rollout import RolloutCallback
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


def test_paths_are_replaced_wherever_they_are():
    old = {"a": [{"b": True, "engine": {"class_path": "longrl.rollout.vllm_engine.VLLMEngine"}}]}
    assert current_names(old) == {"a": [{"b": True, "engine": {"class_path": "longrl.engines.vllm.VLLMEngine"}}]}
    assert current_names("longrl.datamodules.published.canonical_row") == "longrl.datamodules.rows.canonical_row"
    for new in ("longrl.datamodules.rows.lmms_eval_row", "longrl.engines.hf.HFEngine", "my.rows", 3, None):
        assert current_names(new) == new


def test_options_are_replaced_where_they_belong():
    family = {"class_path": "longrl.models.qwen_omni.QwenOmniFamily", "init_args": {"freeze_audio_tower": True}}
    current = {**family, "init_args": {"freeze_audio_encoder": True}}
    assert current_names(family) == current  # a file of its own
    of_user = {"class_path": "my.Family", "init_args": {"freeze_tower": True}}
    assert current_names({"model": {"family": of_user}})["model"]["family"]["init_args"] == {
        "freeze_vision_encoder": True
    }
    engine = {"class_path": "my.Engine", "init_args": {"max_gap": 3}}
    assert current_names({"rollout": {"max_gap": 1, "engine": engine}}) == {
        "rollout": {"max_mismatch": 1, "engine": engine}
    }


@pytest.mark.parametrize(("old", "new"), [(True, 1), (False, 0)])
def test_overlap_is_a_staleness_of_one(old, new, caplog):
    assert current_names({"rollout": {"overlap": old}}) == {"rollout": {"max_staleness": new}}
    of_class = {"class_path": "longrl.RolloutCallback", "init_args": {"overlap": old}}
    assert current_names(of_class)["init_args"] == {"max_staleness": new}
    text = str(old).lower()
    assert current_arguments([f"--rollout.overlap={text}", "--b"]) == [f"--rollout.max_staleness={new}", "--b"]
    assert current_arguments(["--rollout.overlap", text]) == ["--rollout.max_staleness", str(new)]
    others = ["--rollout.max_staleness", "2", "--my.overlap", text, text]
    assert current_arguments(others) == others


def test_options_of_a_users_own_classes_keep_their_names():
    own = {"trainer": {"callbacks": [{"class_path": "my.Watch", "init_args": {"max_gap": 3, "freeze_tower": 1}}]}}
    assert current_names(own) == own
    flags = ["--data.max_gap=3", "--model.my.freeze_tower=1", "--max_refills=2"]
    assert current_arguments(flags) == flags


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("longrl.rewards.text.think_answer_format", "longrl.rewards.answers.think_answer_format"),
        ("longrl.rewards.scoring.RewardSum", "longrl.rewards.reward_sum.RewardSum"),
        ("longrl.rewards.tasks.accuracy_lenient", "longrl.rewards.reward_sum.accuracy_lenient"),
        ("longrl.rewards.choice.multiple_choice", "longrl.rewards.answers.multiple_choice"),
        ("longrl.algorithms.surrogates.clipped", "longrl.algorithms.clipped"),
        ("longrl.algorithms.surrogates.guarded", "longrl.algorithms.grpo_guard"),
        ("longrl.algorithms.guarded", "longrl.algorithms.grpo_guard"),
        ("longrl.algorithms.losses.gaussian_mean", "longrl.algorithms.gaussian_mean"),
        ("longrl.algorithms.corrections.truncated_token", "longrl.algorithms.truncated_token"),
        ("longrl.flow.sampler.FlowSampling", "longrl.diffusion.sampler.DiffusionSampling"),
        ("longrl.flow.steps.ode", "longrl.diffusion.steps.ode_step"),
        ("longrl.datamodules.prompts.PromptFiles", "longrl.diffusion.prompt_files.PromptFiles"),
        ("longrl.datamodules.mixing.DataSource", "longrl.datamodules.loading.mixing.DataSource"),
        ("longrl.datamodules.video.VideoSampling", "longrl.datamodules.media.sampling.VideoSampling"),
        ("longrl.datamodules.subtitles.Subtitles", "longrl.datamodules.media.subtitles.Subtitles"),
    ],
)
def test_classes_and_functions_of_the_first_release_are_found(old, new):
    assert current_names(old) == new
    module, _, name = new.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


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
@pytest.mark.parametrize("form", ["init_args.", ""])
def test_an_option_of_the_last_callback_is_refused_with_its_new_name(option, form):
    flag, new = f"--trainer.callbacks.{form}{option}", option.replace("max_refills", "max_resample_rounds")
    with pytest.raises(ValueError, match=rf"trainer.callbacks.init_args.{new} is now rollout.{new}; write --rollout"):
        main(["fit", flag, "1"])


def test_other_callbacks_keep_their_options_by_position():
    assert current_arguments([]) == []
    assert current_arguments(["--trainer.callbacks.init_args.every_n_steps=5"])
    assert current_arguments(["--trainer.callbacks+", "my.Callback", "--trainer.callbacks.init_args.seed=5"])
    flags = ["--trainer.callbacks=my.Watch", "--trainer.callbacks.max_gap=5"]
    assert current_arguments(flags) == flags


def as_before(values):
    """The config with the names of the release before."""
    rollout, family = values.pop("rollout"), values["model"]["family"]["init_args"]
    rollout = {name if name != "max_resample_rounds" else "max_refills": value for name, value in rollout.items()}
    callback = {"class_path": "longrl.callbacks.rollout.RolloutCallback", "init_args": {**rollout, "max_gap": 0.5}}
    values["trainer"]["callbacks"].append(callback)
    family["freeze_tower"] = True
    return values


@pytest.mark.parametrize("more", [(), ("--print_config",)])
def test_a_users_config_with_the_callback_in_the_list_is_refused(tmp_path, more):
    with pytest.raises(ValueError, match="trainer.callbacks.init_args.X is now rollout.X; move its init_args"):
        main(arguments(tmp_path / "run", as_before(config("rl")), *more))


@pytest.mark.parametrize(
    "class_path",
    ["longrl.callbacks.rollout.RolloutCallback", "longrl.RolloutCallback", "RolloutCallback",
     "longrl.callbacks.flow_rollout.FlowRolloutCallback", "DiffusionRolloutCallback"],
)  # fmt: skip
def test_the_callback_is_refused_in_every_spelling(tmp_path, class_path):
    for args in (["--trainer.callbacks+", class_path], [f"--trainer.callbacks={class_path}"]):
        with pytest.raises(ValueError, match="the rollout callback has a group of its own"):
            current_arguments(["fit", *args])
    values = config("rl")
    values["trainer"]["callbacks"].append(class_path)
    with pytest.raises(ValueError, match="the rollout callback has a group of its own"):
        main(arguments(tmp_path, values, "--print_config"))
    values["trainer"]["callbacks"] = {"class_path": class_path, "init_args": values["rollout"]}
    with pytest.raises(ValueError, match="the rollout callback has a group of its own"):
        main(arguments(tmp_path, values))


class OwnRollout(RolloutCallback):
    """A user's."""


def test_a_rollout_callback_of_ones_own_stands_alone(tmp_path):
    values = config("rl")
    values["trainer"] |= {"max_steps": 1, "callbacks": [{"class_path": f"{__name__}.OwnRollout"}]}
    values["trainer"]["callbacks"][0]["init_args"] = values["rollout"]
    with pytest.raises(ValueError, match="trainer.callbacks has OwnRollout beside the callback of rollout.reward"):
        run(tmp_path / "two", values)
    values["rollout"] = {}
    assert checkpoint(run(tmp_path / "own", values))["global_step"] == 1


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


@pytest.mark.parametrize("callback", ["longrl.callbacks.rollout.RolloutCallback", "longrl.RolloutCallback"])
def test_an_old_run_with_one_callback_or_no_trainer_is_read_too(tmp_path, callback):
    single = {"class_path": callback, "init_args": {"max_gap": 0.3}}
    for trainer, form in (({"callbacks": single}, {"callbacks": []}), ({"callbacks": None}, {"callbacks": None})):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"wandb_project": "mine", "trainer": trainer}))
        found = read_run_config(str(tmp_path))
        assert found["trainer"] == form
        assert found.get("rollout") == ({"max_mismatch": 0.3} if trainer["callbacks"] else None)
    (tmp_path / "config.yaml").write_text("wandb_project: mine\n")
    assert read_run_config(str(tmp_path)) == {"wandb_project": "mine"}


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
    for options in OPTIONS.values():
        assert not options.keys() & set(options.values())
