"""Errors of options: one line with the nearest name, and the line of the config."""

import re

import pytest

from longrl.commands.main import main
from longrl.commands.parsers import explain, find_line
from tests.commands.test_main import typo
from tests.runs import arguments, config

YAML = """
model:
  family:
    class_path: a.B
    init_args: {x: 1, y: [1, 2]}
list:
- {first: 1}
- second: 2
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [("model", 2), ("model.family", 3), ("model.family.y", 5), ("list.second", 8), ("model.x", None), ("z", None)],
)
def test_the_line_of_a_key_is_found_through_lists_and_init_args(name, line):
    assert find_line(YAML, name) == line


@pytest.mark.parametrize("text", ["&a [*a]", "a: &a {a: *a}", "[" * 100_000, "\0", "a: b: c", "", "7"])
def test_a_hostile_yaml_has_no_line(text):
    assert find_line(text, "a.b.c") is None


@pytest.mark.parametrize(
    ("where", "nearest"),
    [
        ("modell", "model"),
        ("model.max_gradd_norm", "model.max_grad_norm"),
        ("model.optimizer.learning_rate", "model.optimizer.lr"),
        ("model.family.init_args.max_pixel", "model.family.max_pixels"),
        ("data.video.fpss", "data.video.fps"),
        ("rollout.sampling.num_generation", "rollout.sampling.num_generations"),
        ("rollout.reward.terms.0.weigth", "rollout.reward.terms.weight"),
    ],
)
def test_a_typo_names_file_line_and_nearest_option(tmp_path, capsys, where, nearest):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path / "run", typo(where)))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"longrl: error: {tmp_path / 'run' / 'given.yaml'}, line ")
    assert line.endswith(f"; did you mean {nearest}?")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", "--model.max_gradd_norm=1"], "did you mean model.max_grad_norm?"),
        (["plan", "--devicse=1"], "there is no option devicse; did you mean devices?"),
        (["serve", "--max_modl_len=1"], "there is no option max_modl_len; did you mean max_model_len?"),
        (["pipeline", "split", "--videos=a", "--out=b", "--split.clip_z=1"], "split.clip_s"),
        (["export", "--runn=a", "--out=b"], "there is no option runn; did you mean run?"),
        (["report", "--run=a", "--titel=b"], "there is no option titel; did you mean title?"),
        (["compare", "a", "b", "--otu=c"], "there is no option otu; did you mean out?"),
        (["demo", "--otu=a"], "there is no option otu; did you mean out?"),
    ],
)  # fmt: skip
def test_every_command_knows_the_nearest_flag(capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longrl: error: ")
    assert said in line


def test_a_value_of_a_wrong_type_names_option_file_and_line(tmp_path, capsys):
    values = config("sft")
    values["data"]["prompts_per_batch"] = "many"
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, values))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"longrl: error: {tmp_path / 'given.yaml'}, line ")
    assert line.endswith("data.prompts_per_batch: Expected a int. Got value: many")


def test_the_values_of_a_group_are_not_said():
    message = """Parser key "a":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'int'>
  Given value type: <class 'dict'>
  Given value: {'api_key': 'canary'}"""
    assert explain(message, [], []) == "a: Expected a int"


BOMB = "n0: &n0 [1, 2]\n" + "".join(f"n{n + 1}: &n{n + 1} [{', '.join([f'*n{n}'] * 4)}]\n" for n in range(12))


@pytest.mark.parametrize("command", [["fit"], ["evaluate"], ["pipeline", "split"], ["diffusion", "fit"]])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: {}\n".encode("utf-16"), "is UTF-16, and must be UTF-8"),
        (b"a: 1\n# caf\xe9\n", "line 2 of .* is no UTF-8"),
        (b"- a\n", "must hold options by name"),
        (b"", "must hold options by name"),
        (b"1: 2\n", "must hold options by name"),
        (BOMB.encode(), "more than 1000000 values"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(tmp_path, capsys, command, content, said):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    try:
        main([*command, f"--config={path}"])
    except ValueError as error:
        text = str(error)
    except SystemExit:
        text = capsys.readouterr().err.strip()
    assert re.search(said, text)
    assert str(path.name) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("data.curriculum", "{pass_rate: {low: 0.1}}",
         "there is no option data.curriculum.pass_rate; did you mean data.curriculum.pass_rates?"),
        ("data.curriculum", "{pass_rates: {low: abc}}",
         "data.curriculum.pass_rates.low: Expected a float. Got value: abc"),
        ("model.consistency", "{bonus: x}", "model.consistency.bonus: Expected a float. Got value: x"),
    ],
)  # fmt: skip
def test_a_mistake_within_the_value_of_an_option_is_told_in_a_few_words(capsys, option, value, said):
    configs = ["--config=configs/demo/common.yaml", "--config=configs/signals/grpo_care.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", *configs, f"--{option}={value}"])
    assert capsys.readouterr().err.strip() == f"longrl: error: {said}"


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        (["evaluate"], "data:\n  tset: 1\n", "line 2: there is no option data.tset; did you mean data.test?"),
        (
            ["evaluate"],
            "data:\n  video:\n    ffps: 1\n",
            "line 3: there is no option data.video.ffps; did you",
        ),
        (
            ["pipeline", "split"],
            "budget:\n  max_call: 1\n",
            "line 2: there is no option budget.max_call; did you mean",
        ),
    ],
)
def test_a_typo_in_a_group_of_a_config_names_the_nearest(tmp_path, capsys, command, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main([*command, f"--config={tmp_path / 'x.yaml'}"])
    assert said in capsys.readouterr().err
