"""The command line of `evaluate`: its errors are short, and a finished evaluation is shown."""

import pytest

from longrl.commands.evaluate import parse_evaluation
from tests.evaluation import scripted
from tests.runs import ROOT


def test_a_finished_evaluation_is_shown_with_its_tables_and_files(tmp_path, capsys):
    scripted.command(tmp_path / "a", policy="Mixed")
    scripted.command(tmp_path / "b", f"--against={tmp_path / 'a'}", "--name=benchmark")
    printed = capsys.readouterr().out
    for text in ("benchmark, in percent", "strict", "b minus a (video)", "every answer that names an option says B"):
        assert text in printed
    assert f"results: {tmp_path / 'b' / 'results.json'}" in printed


def test_a_parsers_error_is_one_line_with_the_nearest_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_evaluation([*scripted.arguments(tmp_path), "--num_crads=3"])
    assert capsys.readouterr().err == "longrl: error: there is no option num_crads; did you mean num_cards?\n"


@pytest.mark.parametrize("recipe", ["demo/sft.yaml", "demo/grpo.yaml"])
def test_the_config_of_a_training_run_is_refused_by_name(recipe):
    path = ROOT / "configs" / recipe
    with pytest.raises(
        ValueError, match=r"^--config \S+ is of a training run .*--policy\.init_args\.weights RUN$"
    ) as error:
        parse_evaluation([f"--config={path}"])
    assert path.name in str(error.value)
    with pytest.raises(ValueError, match="is of a training run"):
        parse_evaluation(["--config", str(path)])
