"""Help of all commands: what it says, that it is as the parsers are, and that it loads nothing heavy."""

import io
import os
import re
import shlex
import subprocess
import sys
from unittest.mock import patch

import pytest

from longrl.commands.help_text import import_classes, is_closed, options_of_class
from longrl.commands.main import OTHER_COMMANDS, TRAINER_COMMANDS, main, usage
from longrl.commands.parsers import ShortErrors
from longrl.commands.show_help import FOLDER, help_page, page_file, show
from longrl.commands.write_help import HEADS, options_of_command, pages
from tests.runs import ROOT

LIGHT = ("doctor", "recipes")
"""Commands of a few options, whose own parser answers at once."""
HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse", "datasets", "wandb", "vllm")
RENEW = "run `python -m longrl.commands.write_help` and commit longrl/commands/help_pages/"
OF_LIGHTNING = "trainer."
"""Options whose description is Lightning's affair."""


LIKE_FIT = ("diffusion", "validate", "test", "cache-features", "diffusion validate", "diffusion test")
"""Commands whose options are those of `fit` or `diffusion fit`: to make their parsers too would take seconds."""


@pytest.fixture(scope="module")
def live():
    """Command -> its options, from its parser."""
    import_classes()
    return {command: options_of_command(command) for command in HEADS if command not in LIKE_FIT}


def test_every_command_has_a_page():
    commands = {*TRAINER_COMMANDS, *OTHER_COMMANDS} - {*LIGHT}
    assert commands <= HEADS.keys(), f"longrl/commands/help_heads.yaml lacks {commands - HEADS.keys()}; then {RENEW}"
    assert all(page_file(command).is_file() for command in HEADS), RENEW


def test_pages_are_what_the_parsers_say(live):
    with patch("longrl.commands.write_help.options_of_command", live.__getitem__):
        written = pages([*live])
    files = {page_file(name) for name in (*written, *LIKE_FIT)}
    assert files == set(FOLDER.glob("*.txt")), RENEW
    stale = [name for name, text in written.items() if page_file(name).read_text(encoding="utf-8") != text]
    assert not stale, f"{', '.join(stale)} in longrl/commands/help_pages/ are of other options than there are; {RENEW}"


@pytest.mark.parametrize("command", HEADS)
def test_a_page_begins_with_usage_one_sentence_and_an_example(command):
    called, says, example = help_page(command).split("\n\n")[:3]
    assert called.startswith(f"usage: python -m longrl {command}")
    assert says.endswith(".")
    assert example.startswith("example:\n  ")
    assert f"python -m longrl {command}" in example


# ---- every option has a description ----


def test_every_option_of_every_command_is_described(live):
    missing = [
        f"{command}: {option.name}"
        for command, options in live.items()
        for option in options
        if not option.help.strip() and not option.name.startswith(f"--{OF_LIGHTNING}")
    ]
    assert not missing, f"say in a docstring what these are: {', '.join(missing)}"


def test_every_option_of_every_class_that_a_config_can_name_is_described(live):
    classes = {one for options in live.values() for option in options for one in option.classes}
    waiting, seen, missing = list(classes), set(), []
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        waiting += one.__subclasses__()
        if not one.__module__.startswith("longrl.") or one.__module__.startswith(("longrl.commands", "longrl.testing")):
            continue
        if not (is_closed(one) or is_named(one)):
            continue
        for option in options_of_class(one):
            waiting += option.classes
            if not option.help.strip():
                missing.append(f"{one.__module__}.{one.__qualname__}: {option.name}")
    assert len(seen) > 60
    assert not missing, f"say in a docstring what these are: {', '.join(missing)}"


def is_named(one):
    """Whether a config can name a class: what crosses file borders within a step is none of them."""
    return one.__module__ != "longrl.types" and one.__name__ not in ("ChatPrompt",)


# ---- examples ----


def examples():
    for texts in HEADS.values():
        lines = texts["example"].replace("\\\n", " ").splitlines()
        yield from (shlex.split(line) for line in lines if "longrl.testing" not in line and not line.startswith("#"))
    for line in usage().splitlines():
        if line.startswith("  python -m longrl "):
            yield shlex.split(line)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", {" ".join(words): words for words in examples()}.values(), ids=" ".join)
def test_examples_parse(words, monkeypatch):
    """As the command line does it, up to the values: what they name need not be there."""
    monkeypatch.chdir(ROOT)
    parse = ShortErrors.parse_args

    def parse_and_stop(parser, *args, **options):
        parse(parser, *args, **options)
        raise Parsed

    assert words[:3] == ["python", "-m", "longrl"]
    with patch.object(ShortErrors, "parse_args", parse_and_stop), pytest.raises(Parsed):
        main(words[3:])


# ---- printing ----


def test_help_of_every_command_imports_nothing_heavy():
    calls = [[*command.split(), "--help"] for command in (*HEADS, *LIGHT)] + [["fit", "--lr", "1", "-h"]]
    code = f"""import contextlib, sys; from longrl.commands.main import main
for args in {calls}:
    with contextlib.suppress(SystemExit): main(args)
print([name for name in {HEAVY} if name in sys.modules])"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert "--model.optimizer.lr" in output


def test_help_lists_classes_that_are_not_imported():
    page = help_page("fit")
    for name in ("engines.hf.HFEngine", "engines.vllm.VLLMEngine", "engines.server.VLLMServerEngine",
                 "models.qwen3_vl.Qwen3VLFamily", "callbacks.generations.Generations"):  # fmt: skip
        assert f"\n    longrl.{name}\n" in page
    for file in re.findall(r"\bin (configs/[\w./-]+\.yaml)", "".join(filter(None, map(help_page, HEADS)))):
        assert (ROOT / file).is_file(), f"{file} is gone; {RENEW}"
    assert "longrl.evaluation.local_policy.LocalPolicy" in help_page("evaluate")


def test_a_low_terminal_gets_a_pager():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    size = os.terminal_size((80, 24))
    with patch("sys.stdout", Terminal()) as out, patch("shutil.get_terminal_size", return_value=size):
        with patch("pydoc.pager") as pager:
            show("line\n" * 100)
            show("line\n" * 10)
        pager.assert_called_once_with("line\n" * 100)
        assert out.getvalue() == "line\n" * 10


def test_help_of_a_class_has_the_programs_name_and_descriptions(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.optimizer.help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m longrl COMMAND --config FILE.yaml [--KEY VALUE ...]\n")
    assert "Peak learning rate" in text
