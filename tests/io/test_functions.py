import subprocess
import sys
from pathlib import Path

import pytest

from longrl.io.functions import check_function, import_function, resolve_function
from longrl.rewards import SoftOverlong, accuracy

FILE = "def brevity(completion, row):\n    return 1.0\n\n\ndef _private():\n    pass\n"


def write_file(folder):
    (folder / "mine.py").write_text(FILE)
    return folder / "mine.py"


def test_a_function_has_an_import_path():
    assert import_function("longrl.rewards.accuracy", "reward") is accuracy


def test_a_function_is_found_in_a_file_and_the_file_runs_once(tmp_path):
    path = write_file(tmp_path)
    function = import_function(f"{path}:brevity", "reward")
    assert function(None, None) == 1.0
    assert import_function(f"{path}:brevity", "data.row_function") is function


def test_relative_files_lie_in_the_working_folder(tmp_path, monkeypatch):
    write_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert import_function("mine.py:brevity", "reward")(None, None) == 1.0


def test_a_file_may_define_dataclasses(tmp_path):
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "@dataclass", "class Rule:"]
    lines += ["    limit: int = 3", "    def __call__(self, value): return value < self.limit", "rule = Rule()"]
    (tmp_path / "rules.py").write_text("\n".join(lines))
    assert import_function(f"{tmp_path}/rules.py:rule", "reward")(2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("longrl.rewards.acuracy", r"x 'longrl\.rewards\.acuracy': longrl\.rewards has no 'acuracy'; it has accuracy"),
        ("longrl.reward.accuracy", r"'longrl\.reward\.accuracy': there is no module 'longrl\.reward'"),
        ("nowhere.f", r"no module 'nowhere'"),
        ("accuracy", r"x must be an import path like .* or file\.py:function, got 'accuracy'"),
        ("missing/file.py:f", r"'missing/file\.py:f': there is no Python file /.*missing/file\.py"),
        (f"{Path(__file__).parent}:f", "there is no Python file"),
        ("longrl.rewards.SoftOverlong", r"x must be a function, got the class SoftOverlong; write it as class_path"),
        ("longrl.rewards.reward_sum.ACCURACY_NAME", r"must be a function, got .*ACCURACY_NAME', a str"),
    ],
)
def test_a_bad_path_is_an_error_that_names_it(path, message):
    with pytest.raises(ValueError, match=message):
        import_function(path, "x")


def test_a_missing_name_in_a_file_is_an_error_that_lists_its_functions(tmp_path):
    with pytest.raises(ValueError, match=r"has no 'length'; it has brevity$"):
        import_function(f"{write_file(tmp_path)}:length", "reward")


def test_a_broken_import_inside_a_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import there_is_no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_package"):
        import_function("broken_rewards.f", "reward")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import there_is_no_such_package\n", "ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        ("from math import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
    ],
)
def test_a_file_that_does_not_run_is_named_with_its_option_in_one_line(tmp_path, text, problem):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^model.reward '\S+:f': \S+mine.py does not run \({problem}.*\); ") as error:
        import_function(f"{path}:f", "model.reward")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, (ImportError, SyntaxError))


def test_an_instance_that_can_be_called_is_a_function():
    check_function(SoftOverlong(max_completion_tokens=8, buffer_tokens=4), "given", "reward")


def test_the_installed_command_searches_the_working_folder(tmp_path):
    write_file(tmp_path)
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]\n"
        "from longrl.commands.main import main; main(['--help'])\n"
        "from longrl.io.functions import import_function; print(import_function('mine.brevity', 'x')(0, 0))"
    )
    script = tmp_path / "bin" / "longrl"
    script.parent.mkdir()
    script.write_text(code)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1.0", done.stderr


@pytest.mark.parametrize("function", [lambda a, b: 1, lambda *args: 1, lambda a, b, c=3: 1, max])
def test_a_function_that_takes_the_arguments_passes(function):
    assert resolve_function(function, "model.algorithm.kl", ("logp", "ref_logp")) is function


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("def f(a):", r"\(a\)"),
        ("def f(a, b, c):", r"\(a, b, c\)"),
        ("def f(a, *, b):", r"\(a, \*, b\)"),
        ("def f():", r"\(\)"),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_with_those_it_gets(tmp_path, text, taken):
    file = tmp_path / "mine.py"
    file.write_text(f"{text}\n    return 1\n")
    message = rf"model\.algorithm\.kl is called as \(logp, ref_logp\), but f takes {taken} \(.*\); give it these"
    with pytest.raises(ValueError, match=message):
        import_function(f"{file}:f", "model.algorithm.kl", ("logp", "ref_logp"))
