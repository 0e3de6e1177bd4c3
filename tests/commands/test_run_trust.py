"""A folder of a run that a stranger made: nothing that its config.yaml names is imported unless the user says so."""

import calendar
import sys
from typing import Any

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import save_file

from longrl.commands.evaluate import parse_evaluation
from longrl.commands.export import export_run
from longrl.commands.main import main
from longrl.commands.parsers import ShortErrors
from longrl.commands.run_trust import check_run_config, is_trusted

FAMILY = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": {"model": "Qwen/Qwen2.5-VL-7B"}}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working folder that leaves a file when it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = f"open({str(tmp_path / 'RUN')!r}, 'w')\ndef fn(*args): pass\nclass Family: pass\nyaml = fn\n"
    (tmp_path / "hostile_module.py").write_text(code)
    yield "hostile_module"
    sys.modules.pop("hostile_module", None)


def run_folder(tmp_path, **values):
    """A folder with the config.yaml of a run."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    config = {"model": {"family": FAMILY}, "data": {"stage": "sft"}, "wandb_project": "longrl", **values}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


HOSTILE = {
    "a class": {"model": {"family": {"class_path": "hostile_module.Family"}}},
    "a class as a text": {"model": {"family": "hostile_module.Family"}},
    "a callback": {"trainer": {"callbacks": [{"class_path": "hostile_module.Family"}]}},
    "a reward": {"rollout": {"reward": {"terms": [{"function": "os.system"}]}}},
    "a reward of a module": {"rollout": {"reward": {"terms": [{"function": "hostile_module.fn"}]}}},
    "a reward in a file": {"rollout": {"reward": {"terms": [{"function": "hostile_module.py:fn"}]}}},
    "a row function": {"data": {"row_function": ["hostile_module.fn"]}},
    "a part of an algorithm": {"model": {"algorithm": {"advantage": "subprocess.Popen"}}},
    "a process as a class": {"trainer": {"plugins": [{"class_path": "subprocess.Popen", "init_args": {"args": "x"}}]}},
    "a function of torch": {"rollout": {"reward": {"terms": [{"function": "torch.hub.load"}]}}},
    "a function as a class": {"trainer": {"strategy": {"class_path": "torch.hub.load"}}},
    "a callable option": {"model": {"optimizer": {"lr_lambda": "os.system"}}},
    "a further config": {"model": {"family": "other.yaml"}},
    "a config in a text": {"model": {"family": '{"class_path": "hostile_module.Family"}'}},
    "a config in an escaped text": {"model": {"family": '{"class\\u005fpath": "hostile_module.Family"}'}},
    "what a module imports": {"trainer": {"logger": {"class_path": "torch.utils.collect_env.subprocess.Popen"}}},
    "what our own module imports": {"rollout": {"reward": {"terms": [{"function": "longrl.io.atomic.os.system"}]}}},
    "code of a model's folder": {"rollout": {"engine": {"init_args": {"options": {"trust_remote_code": True}}}}},
    "a model that an engine loads": {"rollout": {"engine": {"init_args": {"options": {"model": "a/b"}}}}},
    "a judge elsewhere": {"rollout": {"reward": {"terms": [{"endpoint": {"url": "https://evil.example/v1"}}]}}},
    "an engine elsewhere": {"rollout": {"engine": {"init_args": {"urls": ["http://10.0.0.1:8000"]}}}},
    "an environment": {"rollout": {"environment": {"make": "hostile_module.json"}}},
    "an environment in a file": {"rollout": {"environment": {"make": "hostile_module.py:Family"}}},
    "our own function as an environment": {"rollout": {"environment": {"make": "longrl.io.functions.import_function"}}},
    "a class for an environment": {
        "rollout": {
            "environment": {
                "make": "longrl.environments.calculator.Calculator",
                "options": {"other": "hostile_module.json"},
            }
        }
    },
    "an ending of a file": {"trainer": {"strategy": {"class_path": "hostile_module.yaml"}}},
}


@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_a_strangers_config_names_is_refused_before_it_is_imported(tmp_path, module, values):
    folder = run_folder(tmp_path, **values)
    with pytest.raises(ValueError, match=r"run.config\.yaml(, line \d+)?: .* add --trust_run_config true, or name a"):
        main(["test", f"--run_dir={folder}", "--base_weights=true"])
    assert not (tmp_path / "RUN").exists()


def test_the_message_names_file_line_option_and_value(tmp_path, module):
    folder = run_folder(tmp_path, trainer={"callbacks": [{"class_path": "hostile_module.Family"}]})
    text = r"config\.yaml, line 11: trainer\.callbacks\.class_path names 'hostile_module\.Family', and the config"
    with pytest.raises(ValueError, match=text):
        main(["validate", f"--run_dir={folder}", "--base_weights=true"])


def test_a_further_config_in_json_is_refused(tmp_path, module):
    (tmp_path / "other.json").write_text('{"class_path": "hostile_module.Family"}')
    folder = run_folder(tmp_path, model={"family": "other.json"}, data={"train": "rows.json"})
    with pytest.raises(ValueError, match=r"model\.family names the further config 'other\.json'"):
        main(["test", f"--run_dir={folder}", "--base_weights=true"])


@pytest.mark.parametrize("name", ["weights", "weights.txt", "weights.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        "class_path: hostile_module.Family",
        "[hostile_module.Family]",
        "hostile_module.Family\n",
        "terms:\n- function: hostile_module.fn\n",
        "other.jsonl",
        "#" * (1 << 20) + "\nclass_path: hostile_module.Family",
    ],
    ids=["class", "list", "lines", "reward", "nested", "padded"],
)
def test_a_further_config_is_refused_whatever_its_file_is_called(tmp_path, module, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "other.jsonl").write_text("class_path: hostile_module.Family")
    with pytest.raises(ValueError, match=f"trainer.callbacks names the further config '{name}'"):
        check_run_config({"trainer": {"callbacks": [name]}}, tmp_path / "run" / "config.yaml")


@pytest.mark.parametrize("prefix", ["file://", "file:///", "~/"])
def test_a_further_config_is_refused_by_whatever_name_a_parser_finds_it(tmp_path, module, monkeypatch, prefix):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "more").write_text("class_path: hostile_module.Family\n")
    name = f"{prefix}more" if prefix == "~/" else f"{prefix}{tmp_path}/more"
    folder = run_folder(tmp_path, trainer={"callbacks": name})
    with pytest.raises(ValueError, match="trainer.callbacks names the further config"):
        check_run_config(yaml.safe_load((folder / "config.yaml").read_text()), folder / "config.yaml")


def test_no_parser_reads_a_config_from_an_address(capsys):
    fsspec.filesystem("memory").pipe("/more.yaml", b"number: 3")
    parser = ShortErrors()
    parser.add_argument("--config", action="config")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config=memory://more.yaml"])
    assert "memory://more.yaml" in capsys.readouterr().err


def test_no_parser_makes_objects_where_any_value_may_stand():
    parser = ShortErrors()
    parser.add_argument("--options", type=dict[str, Any])
    given = parser.parse_args(['--options={"x": {"class_path": "calendar.Calendar"}}'])
    assert not isinstance(parser.instantiate(given).options["x"], calendar.Calendar)


def test_files_that_are_no_configs_may_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"problem": "os.system"}]')
    (tmp_path / "head.bin").write_bytes(b"\xff\xfeclass_path: os.system")
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    values = {"data": {"train": "rows.json"}, "init_from": "head.bin", "chat_template": "chat.jinja"}
    check_run_config(values, tmp_path / "config.yaml")


def test_a_config_cannot_trust_its_own_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="trust_checkpoint: true, which the command line alone may say"):
        check_run_config({"trust_checkpoint": True}, tmp_path / "config.yaml")


def test_replay_checks_the_run_of_its_record(tmp_path, module):
    folder = run_folder(tmp_path, trainer={"callbacks": [{"class_path": "hostile_module.Family"}]})
    (folder / "nonfinite_steps").mkdir()
    file = folder / "nonfinite_steps" / "step.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"rows": "[]", "facts": "{}"})
    with pytest.raises(ValueError, match=r"trainer\.callbacks\.class_path names 'hostile_module\.Family'"):
        main(["replay", str(file)])
    assert not (tmp_path / "RUN").exists()


POLICY = '--policy={"class_path": "longrl.evaluation.local_policy.LocalPolicy"}'
STRANGE = {"class_path": "hostile_module.Family", "init_args": {"model": "m"}}
REFUSED = r"model\.family\.class_path names 'hostile_module\.Family'"


def test_export_checks_the_family(tmp_path, module):
    folder = run_folder(tmp_path, model={"family": STRANGE})
    with pytest.raises(ValueError, match=REFUSED):
        export_run(str(folder), str(tmp_path / "new"))
    assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize("file", ["config.yaml", "longrl_settings.yaml"])
def test_evaluate_checks_the_family_of_a_run_and_of_an_export(tmp_path, module, file):
    folder = run_folder(tmp_path, model={"family": STRANGE})
    if file != "config.yaml":
        (folder / "config.yaml").unlink()
        (folder / file).write_text(yaml.safe_dump({"family": STRANGE}))
    with pytest.raises(ValueError, match=REFUSED):
        parse_evaluation([POLICY, f"--policy.init_args.weights={folder}", "--data.test=q.jsonl"])
    assert not (tmp_path / "RUN").exists()


def test_a_user_may_trust_a_folder(tmp_path, module):
    folder = run_folder(tmp_path, model={"family": {"class_path": "hostile_module.Family", "init_args": {}}})
    with pytest.raises(SystemExit):  # it is imported, and is no family
        main(["test", f"--run_dir={folder}", "--base_weights=true", "--trust_run_config=true"])
    assert (tmp_path / "RUN").exists()


def test_a_config_cannot_say_that_it_is_trusted(tmp_path, module):
    folder = run_folder(tmp_path, trust_run_config=True, model={"family": "hostile_module.Family"})
    with pytest.raises(ValueError, match="model.family names 'hostile_module.Family'"):
        main(["test", f"--run_dir={folder}", "--base_weights=true"])


@pytest.mark.parametrize(
    ("args", "trusted"),
    [
        (["--trust_run_config", "true"], True),
        (["--trust_run_config=True"], True),
        (["--trust_run_config=false"], False),
        (["--trust_run_config"], False),
        (["true"], False),
    ],
)
def test_trust_is_said_on_the_command_line(args, trusted):
    assert is_trusted(args) is trusted


def test_configs_of_ordinary_runs_name_nothing_else(tmp_path):
    values = {
        "trainer": {"strategy": "longrl.strategies.mr_sp.MRSPStrategy", "precision": "32-true", "accelerator": "cpu"},
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
        "data": {"train": "train.jsonl", "test": ["a.b.parquet"], "row_function": "longrl.datamodules.rows.x"},
        "model": {"family": FAMILY, "init_from": "no_such_module.v1", "algorithm": {"kl": "longrl.algorithms.k3"}},
        "template": "Say os.system and hostile.py:fn in a sentence.",
    }
    check_run_config(values, tmp_path / "config.yaml")


def test_a_nest_without_end_is_refused(tmp_path):
    values = []
    values.append(values)
    with pytest.raises(ValueError, match="nested too deeply"):
        check_run_config({"a": values}, tmp_path / "config.yaml")


@pytest.mark.parametrize("content", ["a: 1".encode("utf-16"), b"- a", b"", b"a: [", b"a: " + b"[" * 20_000])
def test_a_runs_config_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S*config\.yaml [^\n]*$"):
        main(["test", f"--run_dir={tmp_path}", "--base_weights=true"])
