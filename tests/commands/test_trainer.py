"""What `fit` and its like refuse before anything is written, and how a user's mistake looks on the console."""

import json
import sys

import pytest
import torch
from lightning.pytorch import Callback

from longrl.commands.main import main
from longrl.commands.run_folders import check_checkpoints
from tests.runs import arguments, config, rollouts, run, text_config


@pytest.fixture
def values(tmp_path):
    """A run of one step on text."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    found = text_config(rows)
    found["trainer"]["max_steps"] = 1
    return found


# ---- runs and checkpoints that are there, or not ----


def test_fit_does_not_replace_a_run(tmp_path, values):
    folder = run(tmp_path / "run", values)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    values["data"]["prompts_per_batch"] = 1
    (folder / "given.yaml").unlink()
    with pytest.raises(
        ValueError, match=r"holds a run already.*--ckpt_path .*last\.ckpt, or name another --run_dir or"
    ):
        run(folder, values)
    (folder / "given.yaml").unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        path: content for path, content in before.items() if path.name != "given.yaml"
    }


@pytest.mark.parametrize("name", ["last.ckpt", ".last.ckpt.before"])
def test_a_sharded_checkpoint_is_a_run_too(tmp_path, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / name / "meta.pt").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        check_checkpoints("fit", str(tmp_path), None)
    check_checkpoints("test", str(tmp_path), None)
    check_checkpoints("fit", str(tmp_path), str(tmp_path / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path, values, command):
    with pytest.raises(ValueError, match=r"--ckpt_path=\S*nowhere\.ckpt does not exist .*name a checkpoint such as"):
        main(arguments(tmp_path / "run", values, f"--ckpt_path={tmp_path / 'nowhere.ckpt'}", command=command))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_checkpoints_that_lightning_finds_itself_are_not_looked_for(tmp_path):
    for name in ("last", "best", "hpc", "s3://bucket/last.ckpt"):
        check_checkpoints("fit", str(tmp_path), name)


# ---- mistakes on the command line ----


def typed(monkeypatch, *args):
    """`longrl ARGS` as a user types it, apart from tests that call `main(args)`."""
    monkeypatch.setattr(sys, "argv", ["longrl", *map(str, args)])
    main()


@pytest.fixture
def alone(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LONGRL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as stop:
        typed(monkeypatch, "export", "--run", tmp_path, "--out", tmp_path / "new")
    assert stop.value.code == 2
    line = f"longrl: error: --run={tmp_path} has no config.yaml; name the folder of a training run (its --run_dir)\n"
    assert capsys.readouterr().err == line


@pytest.mark.usefixtures("alone")
def test_a_misspelt_reward_in_a_callback_is_one_line(tmp_path, monkeypatch, capsys):
    values = config("rl")
    values["rollout"] = rollouts("longrl.rewards.acuracy")
    with pytest.raises(SystemExit):
        typed(monkeypatch, *arguments(tmp_path / "run", values))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("longrl: error: reward 'longrl.rewards.acuracy': longrl.rewards has no 'acuracy'")
    assert len(lines) <= 2  # Lightning tells its seed


# ---- help ----


def shown(capsys, *args):
    with pytest.raises(SystemExit):
        main(args)
    output = capsys.readouterr()
    return output.out + output.err


def test_a_command_alone_says_that_it_takes_a_config(capsys):
    text = shown(capsys, "fit")
    assert text.startswith("longrl: error: ")
    assert "usage: python -m longrl {fit,validate,test,predict} --config FILE.yaml " in text


def test_a_wrong_option_is_told_without_the_page_of_all_options(capsys):
    text = shown(capsys, "fit", "--modell=1")
    assert text == "longrl: error: there is no option modell; did you mean model?\n"


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_help_begins_with_how_to_list_the_options_of_a_class(capsys, command):
    main([command, "--help"])
    text = capsys.readouterr().out.split("\noptions:")[0]
    assert f"`python -m longrl {command} --rollout.engine.help CLASS` lists what a class takes" in text
    assert text.startswith(f"usage: python -m longrl {command} --config FILE.yaml")


@pytest.mark.parametrize("command", ["export", "demo", "cache-features"])
def test_other_commands_have_the_programs_name(capsys, command):
    main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m longrl {command} ")


def test_an_export_takes_the_precisions_there_are(tmp_path, capsys):
    text = shown(capsys, "export", "--run", str(tmp_path), "--out", str(tmp_path / "new"), "--dtype", "bf16")
    assert "Expected a typing.Literal['float32', 'bfloat16', 'float16']" in text


# ---- before there is a parser, and before there is a trainer ----


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1")
    with pytest.raises(ValueError, match=r"--config .*bad\.yaml is no YAML: .*line 1, column 4"):
        main(["fit", "--config", str(file)])


@pytest.mark.parametrize("command", ["fit", "plan", "serve", "cache-features"])
def test_a_config_of_the_time_when_a_key_chose_diffusion_names_the_command_of_today(tmp_path, command):
    file = tmp_path / "flow.yaml"
    file.write_text("policy: flow\nmodel: {family: {class_path: longrl.models.sd3.SD3Family}}\n")
    with pytest.raises(ValueError, match="whose commands are python -m longrl diffusion fit"):
        main([command, "--config", str(file)])


@pytest.mark.parametrize("command", ["fit", "validate", "plan"])
@pytest.mark.parametrize("family", ["{class_path: longrl.diffusion.sd3.SD3Family}", "sd3.yaml"])
def test_a_config_of_a_diffusion_model_names_its_commands(tmp_path, command, family):
    (tmp_path / "sd3.yaml").write_text("class_path: longrl.models.sd3.SD3Family\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{family: {family}}}\n")
    with pytest.raises(ValueError, match="is of a diffusion model, whose commands are python -m longrl diffusion fit"):
        main([command, "--config", str(file)])


def test_a_config_of_a_language_model_is_none_of_diffusion(tmp_path):
    file = tmp_path / "recipe.yaml"
    for text in ("model: {family: {class_path: longrl.models.text.TextFamily}}\n", "policy: causal\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="is of a language model, whose commands are python -m longrl fit"):
            main(["diffusion", "fit", "--config", str(file)])


@pytest.mark.parametrize("flag", [["--policy", "flow"], ["--policy=flow"], ["--policy=causal"]])
def test_the_flag_that_chose_diffusion_names_the_commands_of_today(flag):
    with pytest.raises(
        ValueError, match=r"--policy=\w+ is gone; leave it out, and train diffusion models by longrl diffusion fit"
    ):
        main(["fit", *flag])


def test_rl_without_a_reward_ends_before_anything_is_built(tmp_path):
    values = config("rl")
    del values["rollout"]["reward"]
    with pytest.raises(ValueError, match=r"RL needs rollout\.reward, .* --rollout\.reward FILE\.yaml"):
        run(tmp_path / "run", values)


class OwnRollouts(Callback):
    """Rolls out, but is no RolloutCallback."""


def test_rl_with_a_callback_that_is_no_rollout_callback_says_what_it_must_be(tmp_path):
    values = config("rl")
    del values["rollout"]["reward"]
    values["trainer"]["callbacks"] = ["tests.commands.test_trainer.OwnRollouts"]
    with pytest.raises(ValueError, match=(
        r"RL needs rollout\.reward.*OwnRollouts of trainer\.callbacks is to roll out, make it a subclass of "
        r"longrl\.callbacks\.rollout\.RolloutCallback"
    )):  # fmt: skip
        run(tmp_path / "run", values)


def test_options_of_rollouts_that_never_happen_get_a_warning(tmp_path, values, caplog):
    values["rollout"] = {"seed": 3, "sampling": {"num_generations": 4}}
    run(tmp_path / "run", values)
    assert "without rollout.reward these have no effect: rollout.sampling, rollout.seed" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_recipe_for_gpus_says_what_to_append_on_a_laptop(tmp_path, values):
    values["trainer"]["accelerator"] = "gpu"
    with pytest.raises(ValueError, match="torch sees no GPU here; append --trainer configs/trainer/cpu.yaml"):
        run(tmp_path / "run", values)


def test_a_strategy_without_options_is_its_class_path(tmp_path, values):
    values["trainer"] |= {"strategy": "longrl.strategies.mr_sp.MRSPStrategy", "max_steps": 1}
    run(tmp_path / "run", values)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_dir()  # MRSPStrategy's are sharded
