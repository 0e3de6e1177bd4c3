"""Short names: what they stand for, what wins, and that they hide no option of a command."""

import re

import pytest

from longrl.commands.aliases import ALIASES, without_aliases
from longrl.commands.main import main
from longrl.commands.parsers import ShortErrors
from tests.runs import ROOT


def test_short_names_stand_behind_configs_and_families_before_their_weights():
    args = ["fit", "--weights", "W", "--lr=1e-6", "--family", "F", "--config", "a.yaml", "--data.seed", "3"]
    long = ["--model.family=F", "--data.seed", "3", "--model.family.init_args.model=W", "--model.optimizer.lr=1e-6"]
    assert without_aliases(args) == ["fit", "--config", "a.yaml", *long]


def test_of_a_short_name_given_twice_the_last_counts():
    assert without_aliases(["evaluate", "--limit", "3", "--limit=-1"]) == ["evaluate", "--data.max_eval_rows=-1"]


def test_of_a_short_name_and_its_long_one_the_later_counts():
    assert without_aliases(["fit", "--lr", "1", "--model.optimizer.lr", "2"]) == ["fit", "--model.optimizer.lr", "2"]
    both = ["fit", "--model.optimizer.lr", "2", "--model.optimizer.lr=1"]
    assert without_aliases(["fit", "--model.optimizer.lr", "2", "--lr", "1"]) == both


def test_commands_without_short_names_keep_their_options():
    args = ["pipeline", "split", "--out", "x", "--steps", "y"]
    assert without_aliases(args) == args
    assert without_aliases([]) == []
    assert without_aliases(["plan", "--frames", "8"]) == ["plan", "--frames", "8"]


def test_diffusion_has_its_own():
    long = ["--model.optimizer.lr=1", "--trainer.max_steps=2"]
    assert without_aliases(["diffusion", "fit", "--lr", "1", "--steps=2"]) == ["diffusion", "fit", *long]


@pytest.mark.parametrize("args", [["fit", "--lr"], ["fit", "--lr", "--config", "x.yaml"]])
def test_a_short_name_without_a_value_is_refused(args):
    with pytest.raises(ValueError, match="--lr needs a value behind it; it is short for --model.optimizer.lr"):
        without_aliases(args)


@pytest.mark.parametrize("command", [*ALIASES])
def test_short_names_hide_no_option_and_lead_to_one(command, monkeypatch):
    options = []

    def parse(parser, *args, **more):
        options.extend(parser._option_names())
        raise SystemExit

    monkeypatch.setattr(ShortErrors, "parse_args", parse)
    monkeypatch.setattr(ShortErrors, "given", command.split()[-1:], raising=False)
    with pytest.raises(SystemExit):
        main(command.split())
    for short, option in ALIASES[command].items():
        assert short not in options
        group = option.partition(".init_args")[0]
        assert group in options or group.rpartition(".")[0] in options


def test_the_page_of_the_command_line_names_every_short_name_and_its_option():
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for command in ("fit", "test", "evaluate"):
        for short, option in ALIASES[command].items():
            assert f"--{short}" in page
            assert f"`{option}`" in page


@pytest.mark.parametrize(
    ("name", "meant"), [("train", "fit"), ("evalaute", "evaluate"), ("eval", "evaluate"), ("xyz", "")]
)
def test_an_unknown_command_has_a_nearest_one(name, meant):
    said = f"did you mean {meant}?" if meant else "choose one of fit"
    with pytest.raises(ValueError, match=re.escape(f"unknown command '{name}'; {said}")):
        main([name])
