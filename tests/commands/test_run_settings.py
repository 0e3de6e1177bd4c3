"""`evaluate` asks a run's weights as the run was asked: what the run says, what wins over it, and what is told."""

import json
import shutil

import pytest
import yaml

from longrl.commands.evaluate import parse_evaluation
from longrl.commands.export import export_run
from longrl.commands.run_settings import read_settings, write_record
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import SamplingParams
from tests.evaluation.scripted import questions
from tests.runs import saved_run
from tests.tiny import vl_folder

TEMPLATE = "Look. {problem}\nThe answer: <b>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with settings of its own: 50 x 50 pixels at most, half a frame per second, a short question."""
    folder = saved_run(tmp_path_factory.mktemp("of") / "run", Qwen2_5_VLFamily(vl_folder(), random_init=True))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["family"]["init_args"] |= {
        "dtype": "float32", "max_pixels": 2500, "min_pixels": 784, "lora": {"rank": 4},
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    config["data"] = {
        "video": {"fps": 0.5, "num_frames": None, "min_frames": 2, "max_frames": 9, "span_s": None, "torn": "skip"},
        "question_template": TEMPLATE,
    }
    sampling = {"num_generations": 8, "max_completion_tokens": 77, "temperature": 1.0, "top_p": 0.9, "top_k": 3}
    config["rollout"] = {"reward": {"terms": []}, "sampling": sampling, "eval_sampling": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def parsed(tmp_path, weights, *more, config=None):
    """Config and data of `evaluate` whose policy file names another family than the run."""
    policy = tmp_path / "policy.yaml"
    family = {"class_path": "longrl.models.text.TextFamily", "init_args": {"model": "nobody/knows"}}
    described = {"class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": {"family": family}}
    policy.write_text(yaml.safe_dump(described))
    files = []
    if config is not None:
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
        files = ["--config", str(tmp_path / "eval.yaml")]
    args = [*files, f"--policy={policy}", f"--policy.init_args.weights={weights}", f"--data.test={questions()}"]
    return parse_evaluation([*args, "--out=somewhere", "--policy.init_args.device=cpu", *more])


def test_family_pixels_frames_template_and_length_are_the_runs(tmp_path, run, caplog):
    config, data = parsed(tmp_path, run)
    family = config.policy.family
    assert (type(family), family.max_pixels, family.chat_template_kwargs) == (
        Qwen2_5_VLFamily, 2500, {"enable_thinking": False},
    )  # fmt: skip
    assert (data.renderer.video.fps, data.renderer.video.max_frames) == (0.5, 9)
    assert data.renderer.question_template == TEMPLATE
    assert config.sampling == SamplingParams(1, 77, 0.0)
    assert "not asked as" not in caplog.text


def test_options_of_the_command_line_win_and_the_difference_is_one_line(tmp_path, run, caplog):
    options = ["--data.video.fps=1", "--policy.init_args.family.init_args.max_pixels=1000", "--sampling.temperature=1"]
    config, data = parsed(tmp_path, run / "checkpoints" / "last.ckpt", *options)
    assert (data.renderer.video.fps, data.renderer.video.max_frames) == (1.0, 9)
    assert (config.policy.family.max_pixels, config.policy.family.min_pixels) == (1000, 784)
    assert config.sampling.temperature == 1.0
    (line,) = [record.message for record in caplog.records if "not asked as" in record.message]
    for text in ("max_pixels is 1000 (the run: 2500)", "video.fps is 1.0 (the run: 0.5)"):
        assert text in line


def test_a_file_with_frames_alone_gives_way_and_one_with_its_own_wording_does_not(tmp_path, run, caplog):
    video = {"fps": None, "num_frames": 3, "min_frames": 1, "max_frames": 3}
    _, data = parsed(tmp_path, run, config={"data": {"video": video}, "sampling": {"max_completion_tokens": 5}})
    assert (data.renderer.video.fps, data.renderer.video.num_frames) == (0.5, None)
    assert "frames and template are those of" in caplog.text
    family = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": {"model": "x/y", "max_pixels": 3136}}
    local = {"class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": {"family": family}}
    published = {"data": {"video": video, "question_template": "Q: {problem}"}, "policy": local}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(published))
    config, data = parse_evaluation(
        [f"--config={tmp_path / 'eval.yaml'}", f"--policy.init_args.weights={run}", "--policy.init_args.device=cpu",
         f"--data.test={questions()}", "--out=somewhere"]
    )  # fmt: skip
    assert (data.renderer.video.num_frames, data.renderer.question_template) == (3, "Q: {problem}")
    assert (config.policy.family.model_path, config.policy.family.max_pixels) == (vl_folder(), 3136)


def test_a_protocols_limits_stay_behind_another_policy_and_the_precision_is_the_runs(tmp_path, run):
    limits = {"model": "x/y", "max_pixels": 3136, "dtype": "bfloat16"}
    family = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": limits}
    local = {"class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": {"family": family}}
    other = {**local, "init_args": {"family": {**family, "init_args": {"model": "x/z", "max_pixels": 50176}}}}
    (tmp_path / "eval.yaml").write_text(
        yaml.safe_dump({"data": {"question_template": "Q: {problem}"}, "policy": local})
    )
    (tmp_path / "hf.yaml").write_text(yaml.safe_dump(other))
    config, _ = parse_evaluation(
        [f"--config={tmp_path / 'eval.yaml'}", f"--policy={tmp_path / 'hf.yaml'}", f"--data.test={questions()}",
         f"--policy.init_args.weights={run}", "--policy.init_args.device=cpu", "--out=somewhere"]
    )  # fmt: skip
    assert (config.policy.family.max_pixels, config.policy.family.dtype) == (3136, "float32")


def test_a_wording_in_a_file_that_the_config_names_is_its_own_too(tmp_path, run):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"question_template": "Q: {problem}"}))
    _, data = parsed(tmp_path, run, config={"data": "data.yaml"})
    assert data.renderer.question_template == "Q: {problem}"


@pytest.mark.parametrize("name", ["--policy", "--policy.class_path"])
def test_an_option_wins_in_front_of_the_policy_too(run, name):
    config, data = parse_evaluation(
        ["--data.video.fps=1", f"{name}=longrl.evaluation.local_policy.LocalPolicy", f"--data.test={questions()}",
         f"--policy.init_args.weights={run}", "--policy.init_args.device=cpu", "--out=somewhere"]
    )  # fmt: skip
    assert (data.renderer.video.fps, config.policy.family.max_pixels) == (1.0, 2500)


def test_an_export_is_asked_as_its_run_was_wherever_it_lies(tmp_path, run):
    export_run(str(run), str(tmp_path / "export"))
    (tmp_path / "export").rename(tmp_path / "moved")
    assert read_settings(str(tmp_path / "moved")).family["init_args"].keys().isdisjoint({"lora", "random_init"})
    config, data = parsed(tmp_path, tmp_path / "moved")
    assert (config.policy.family.model_path, config.policy.family.max_pixels) == (str(tmp_path / "moved"), 2500)
    assert (data.renderer.video.fps, data.renderer.question_template) == (0.5, TEMPLATE)
    assert str(run) not in (tmp_path / "moved" / "longrl_settings.yaml").read_text()


def test_an_export_says_of_which_tokens_others_do_not_know(tmp_path, run, caplog):
    pooled = tmp_path / "pooled"
    pooled.mkdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    write_record(tmp_path, str(run))
    assert "note" not in yaml.safe_load((tmp_path / "longrl_settings.yaml").read_text())
    config["model"]["family"]["init_args"] |= {"spatial_pool": 2, "max_kept_tokens": None}
    (pooled / "config.yaml").write_text(yaml.safe_dump(config))
    write_record(tmp_path, str(pooled))
    record = yaml.safe_load((tmp_path / "longrl_settings.yaml").read_text())
    assert record["note"].startswith("trained with spatial_pool=2: no file of these weights says so")
    assert record["family"]["init_args"]["spatial_pool"] == 2
    assert "show every feature of a video" in caplog.text


def test_without_a_family_weights_must_say_it(run, capsys):
    policy = {"class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": {"device": "cpu"}}
    args = [f"--policy={json.dumps(policy)}", f"--data.test={questions()}", "--out=somewhere"]
    config, _ = parse_evaluation([*args, f"--policy.init_args.weights={run}"])
    assert config.policy.family.max_pixels == 2500
    with pytest.raises(SystemExit):
        parse_evaluation([*args, "--policy.init_args.weights=org/model"])
    assert "the following arguments are required: family" in capsys.readouterr().err


def test_whoever_learned_with_tools_is_asked_with_them(tmp_path, run):
    """Unless an option says otherwise; a folder of a stranger may name environments of longrl alone."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"]["environment"] = {"make": "longrl.environments.calculator.Calculator", "max_turns": 3}
    with_tools = tmp_path / "with_tools"
    shutil.copytree(run, with_tools)
    (with_tools / "config.yaml").write_text(yaml.safe_dump(config))
    policy = parsed(tmp_path, with_tools)[0].policy
    assert policy.environment.max_turns == 3
    assert [tool["function"]["name"] for tool in policy.family.tools] == ["calculate"]
    policy.close()
    assert parsed(tmp_path, with_tools, "--policy.init_args.environment=null")[0].policy.environment is None
    assert parsed(tmp_path, run)[0].policy.environment is None

    config["rollout"]["environment"]["make"] = "tests.environment_runs.Clips"
    (with_tools / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"environment\.make names 'tests\.environment_runs.*--trust_run_config"):
        parsed(tmp_path, with_tools)
