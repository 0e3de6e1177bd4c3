"""What users of other trainers and evaluators type, and what the error says it is called here."""

import pytest

from longrl.commands.aliases import aliases_of
from longrl.commands.main import main
from longrl.commands.parsers import ShortErrors, explain, foreign_names
from tests.runs import arguments, config

NEEDED = """model_name_or_path num_generations learning_rate per_device_train_batch_size gradient_accumulation_steps
output_dir beta max_completion_length num_train_epochs resume_from_checkpoint report_to bf16 deepspeed use_vllm tasks
model_args data.train_batch_size actor_rollout_ref.rollout.n"""


@pytest.fixture(scope="module")
def options():
    """Names of the options of `fit` and `evaluate`."""
    with pytest.MonkeyPatch.context() as patch:
        found = []

        def parse(parser, *args, **more):
            found.extend(parser._option_names())
            raise SystemExit

        patch.setattr(ShortErrors, "parse_args", parse)
        for command in ("fit", "evaluate"):
            patch.setattr(ShortErrors, "given", [command])
            with pytest.raises(SystemExit):
                main([command])
    return found


def test_the_table_leads_to_options_that_there_are(options):
    assert set(NEEDED.split()) <= foreign_names().keys()
    for name, entry in foreign_names().items():
        assert name not in options or name in ("max_steps",)
        entry = entry if isinstance(entry, dict) else {"option": entry}
        assert entry.keys() <= {"option", "note"}
        named = entry.get("option", [])
        for option in [named] if isinstance(named, str) else named:
            if option == "run":  # of `export`
                continue
            group = option.partition(".init_args")[0]
            assert group in options or group.rpartition(".")[0] in options, (name, option)


@pytest.mark.parametrize(
    ("command", "name", "said"),
    [
        ("fit", "setps", "trainer.max_steps (short: --steps)"),
        ("fit", "weigths", "model.family.init_args.model (short: --weights)"),
        ("fit", "learning_rat", "model.optimizer.lr (short: --lr)"),
        ("fit", "model.lr", "model.optimizer.lr"),
        ("evaluate", "weigths", "policy.init_args.weights (short: --weights)"),
        ("plan", "learning_rate", "model.optimizer.lr"),
        ("diffusion fit", "devces", "trainer.devices (short: --devices)"),
        ("export", "output_dir", "out"),
    ],
)
def test_a_typo_leads_to_the_nearest_name_and_the_short_one_of_its_command(command, name, said, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), f"--{name}", "1"])
    assert capsys.readouterr().err.endswith(f"there is no option {name}; did you mean {said}?\n")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("unrecognized arguments: --learning_rate=1", "did you mean model.optimizer.lr (short: --lr)?"),
        ("unrecognized arguments: --bf16", "did you mean trainer.precision (short: --precision, bf16-mixed or bf16-"),
        ("unrecognized arguments: actor_rollout_ref.rollout.n=8", "did you mean rollout.sampling.num_generations?"),
        ("unrecognized arguments: actor_rollout_ref.x=8", "docs/command_line.md says what verl's options are"),
        ("unrecognized arguments: runs/a.yaml", "a config file stands behind --config: --config runs/a.yaml"),
        ("unrecognized arguments: demo/sft", "a config file stands behind --config: --config demo/sft"),
        ("unrecognized arguments: --num_fewshot 0", "questions are asked without examples"),
        ("unrecognized arguments: --modle.optimizer.lr 1", "did you mean model.optimizer.lr?"),
        ("unrecognized arguments: --zzz", "--help lists all that there are"),
    ],
)
def test_a_foreign_name_is_translated(options, message, said):
    assert said in explain(message, ["fit"], options, aliases_of("fit"))


def test_of_a_command_without_the_option_nothing_is_said():
    assert "--help lists" in explain("unrecognized arguments: --num_generations=1", ["compare"], ["out"])


def test_a_foreign_name_in_a_file_has_its_line(tmp_path, capsys):
    values = config("sft")
    values["learning_rate"] = 1e-6
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "run", values))
    (line,) = capsys.readouterr().err.splitlines()
    assert "given.yaml, line " in line
    assert line.endswith("there is no option learning_rate; did you mean model.optimizer.lr (short: --lr)?")


def test_a_name_for_a_whole_group_says_what_is_meant(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "Qwen/Qwen2.5-VL-7B-Instruct"])
    text = capsys.readouterr().err.removeprefix("longrl: error: ")
    assert text.startswith("model takes a YAML file with options, and 'Qwen/Qwen2.5-VL-7B-Instruct' is none; weights")
