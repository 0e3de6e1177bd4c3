"""README's commands: what they name exists, and those of recipes parse as they stand."""

import re
import shlex

import pytest

from longrl.commands.main import OTHER_COMMANDS, TRAINER_COMMANDS, main
from tests.runs import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() if line.startswith("python -m longrl ")]
OF_RECIPES = [words[3:] for words in COMMANDS if "configs/" in " ".join(words) and words[3] in TRAINER_COMMANDS]


def test_files_and_commands_that_are_named_exist():
    for path in re.findall(r"--config (\S+\.yaml)", TEXT):
        assert path.startswith("my_run/") or (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((\S+?)\)", TEXT):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for path in re.findall(r"(?:python |PYTEST_ARGS=|bash )([\w/.]+/[\w/.]+)", TEXT):
        assert path.startswith("my_run/") or (ROOT / path).exists(), path
    for command in re.findall(r"python -m longrl ([\w-]+)", TEXT):
        assert command in {*TRAINER_COMMANDS, *OTHER_COMMANDS}, command
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make (env|demo|test|lint|docs)\b", TEXT):
        assert target in targets


@pytest.mark.parametrize("args", OF_RECIPES, ids=" ".join)
def test_a_command_with_a_recipe_parses(args, tmp_path, monkeypatch, capsys):
    """From a folder of its own: recipes are found by name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code in (None, 0)
    assert "class_path: longrl." in capsys.readouterr().out


def test_the_walk_with_own_videos_is_that_of_its_example():
    """tests/examples/test_own_videos.py runs that one."""
    of_example = (ROOT / "examples/own_videos/README.md").read_text()
    assert len(OF_RECIPES) >= 4
    for words in COMMANDS:
        if "my_run" in " ".join(words):
            options = [word for word in words if word.startswith("--") and word != "--cpu"]
            assert f"python -m longrl {words[3]}" in of_example
            assert all(option in of_example for option in options), words
