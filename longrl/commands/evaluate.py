"""`python -m longrl evaluate`: a policy on a benchmark, here or behind an endpoint, with a report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from rich.console import Console

from longrl.commands.closing import longrl, say_end
from longrl.commands.compare import show_comparisons
from longrl.commands.failures import keep_tracebacks_in
from longrl.commands.main import COMMAND_USAGE
from longrl.commands.parsers import ShortErrors
from longrl.commands.renamed import current_names
from longrl.commands.run_config import Config, evaluation_config, set_config_reader
from longrl.commands.run_settings import (
    SHOWN_BY_DATA,
    RunSettings,
    check_settings,
    options_of,
    read_settings,
    tell_differences,
)
from longrl.commands.run_trust import CHECKPOINT_HELP, CHECKPOINT_OPTION, OPTION, TRUST_HELP, is_trusted
from longrl.commands.shipped_paths import with_shipped_values
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.benchmark import Evaluation, EvaluationConfig
from longrl.evaluation.benchmark_report import figures_table, list_remarks, rates_table
from longrl.evaluation.graded_tables import TABLE_WIDTH, graded_tables
from longrl.evaluation.protocol import is_limit, list_protocol_facts
from longrl.evaluation.result_files import EvaluationFiles
from longrl.evaluation.samples import RESULTS_FILE
from longrl.evaluation.scores import percent
from longrl.evaluation.timings import write_command
from longrl.io.checkpoint_files import trust_checkpoints
from longrl.io.hub_errors import naming_option
from longrl.io.plain_yaml import load_yaml
from longrl.io.tables import make_table
from longrl.io.text_files import read_utf8

logger = logging.getLogger(__name__)

DESCRIPTION = """Evaluates a policy on a benchmark; configs/eval/ has examples. The same command goes on where it was
killed: what was answered is not asked again. Weights of a run, or of its export, are asked as the run was: family,
pixels, frames and question template are the run's; options of the command line win, and a config file with a
data.question_template of its own."""
FILE_OPTIONS = ("--config", "--policy", "--data")
FILE_ENDINGS = (".yaml", ".yml", ".json")
WEIGHTS = ("policy", "init_args", "weights")
ConfigFile = tuple[Path, Config]
"""A config file of a command line and its values."""
NOT_HERE = frozenset(
    ("family", "train", "val", "stage", "response_template", "answer_template", "blind_share", "prompts_per_batch",
     "max_train_rows", "seed", "prefetch_prompts")
)  # fmt: skip
"""Options of the data module that an evaluation has no use for."""


def main(args: Sequence[str]) -> None:
    """Command line of `evaluate`."""
    with naming_option("policy.init_args.family.init_args.model"):
        config, data = parse_evaluation(args)
        keep_tracebacks_in(config.out)
        files = Evaluation(config, data).run()
    if files is not None:
        write_command(files.report.parent, ["evaluate", *args])
        show_evaluation(files)
        folder = files.report.parent
        say_end([], [longrl("compare", "OTHER", folder), longrl("scoreboard", folder)])


def parse_evaluation(args: Sequence[str]) -> tuple[EvaluationConfig, LongVideoReason]:
    """The evaluation and the data that a command line describes; nothing is read or loaded yet."""
    set_config_reader(evaluation_config)
    usage = COMMAND_USAGE.format("python -m longrl", "evaluate")
    parser = ShortErrors(prog="python -m longrl evaluate", usage=usage, description=DESCRIPTION)
    parser.add_argument("--config", action="config", help="a YAML file; later ones win, key by key")
    parser.add_argument(OPTION, type=bool, default=False, help=TRUST_HELP)
    parser.add_argument(CHECKPOINT_OPTION, type=bool, default=False, help=CHECKPOINT_HELP)
    parser.add_class_arguments(EvaluationConfig, sub_configs=True)
    parser.add_class_arguments(LongVideoReason, "data", skip=set(NOT_HERE), instantiate=False, sub_configs=True)
    files = list(_read_files(args))
    settings = read_settings(_weights(args, files))
    if settings is not None:
        check_settings(settings, is_trusted(args))
        args = with_run_settings(args, files, settings)
    parsed = parser.parse_args(list(args))
    if settings is not None:
        tell_differences(settings, _asked(parsed))
    trust_checkpoints(parsed.trust_checkpoint)
    values = parser.instantiate(parsed)
    config = EvaluationConfig(**{item.name: values[item.name] for item in dataclasses.fields(EvaluationConfig)})
    return config, LongVideoReason(config.policy.family, **vars(values.data))


def with_run_settings(args: Sequence[str], files: Sequence[ConfigFile], settings: RunSettings) -> list[str]:
    """A command line of `evaluate` that asks as a run did, where neither it nor a file with its own template differs.

    Args:
        args: the command line.
        files: that it names.
        settings: of the run whose weights it names.
    """
    # 1. What the files say of how questions are shown.
    of_data = [(file, shown) for file in files if isinstance(shown := _value_in(*file, "data"), dict)]
    protocols = [file for file, shown in of_data if "question_template" in shown]
    sampled = any("sampling" in part for _, part in files) or any(arg.startswith("--sampling") for arg in args)

    # 2. The run's family, in the place of any that a file names; a protocol's own limits of pixels stay.
    family = settings.family
    for file in protocols:
        named = _value_in(*file, "policy", "init_args", "family")
        if isinstance(named, dict) and named.get("class_path") == family["class_path"]:
            options = named.get("init_args") or {}
            own = {name: value for name, value in options.items() if is_limit(name)}
            family = family | {"init_args": family["init_args"] | own}
    of_policy = [f"--policy.init_args.family={json.dumps(family)}"]
    # Whoever learned with tools is asked with them.
    has_own = any("environment" in (_value_in(*file, "policy", "init_args") or {}) for file in files)
    if settings.environment and not has_own:
        of_policy.append(f"--policy.init_args.environment={json.dumps(settings.environment)}")

    # 3. Its frames, template and sampling.
    shown_by_run = []
    if not protocols:
        shown_by_run += [f"--data.{name}={_as_text(value)}" for name, value in settings.data.items()]
    if settings.sampling and not sampled:
        shown_by_run += [f"--sampling={json.dumps(settings.sampling)}"]
    if not protocols and any(name in shown for _, shown in of_data for name in SHOWN_BY_DATA):
        logger.warning("frames and template are those of %s, not of the config files", settings.source)

    # 4. Each behind the files that it replaces, before the options that win.
    args = _insert_behind(("--config", "--policy", "--policy.class_path"), args, of_policy)
    return _insert_behind(("--config", "--data"), args, shown_by_run)


def _insert_behind(options: Sequence[str], args: Sequence[str], given: Sequence[str]) -> list[str]:
    """A command line with further options behind the last of `options`, or in front of all."""
    last = max((at for at, arg in enumerate(args) if arg.partition("=")[0] in options), default=-1)
    end = last + 1 if last < 0 or "=" in args[last] else last + 2
    return [*args[:end], *given, *args[end:]]


def _read_files(args: Sequence[str]) -> Iterator[ConfigFile]:
    """The config files of a command line. One of a part, or its values in JSON, counts as a config with that part."""
    for option in FILE_OPTIONS:
        for text in options_of(args, option):
            path = Path(text)
            is_file = path.suffix in FILE_ENDINGS and path.is_file()
            values = _read_yaml(read_utf8(path) if is_file else text)
            if isinstance(values, dict):
                yield path, values if option == "--config" else {option.removeprefix("--"): values}


def _read_yaml(text: str) -> Any:
    """What a YAML text holds; None of one that is no YAML, which the parser will say."""
    try:
        return with_shipped_values(current_names(load_yaml(text)), Path.cwd())
    except yaml.YAMLError:
        return None


def _weights(args: Sequence[str], files: Sequence[ConfigFile]) -> str | None:
    """The weights of the policy: the last option that names them, or the last file."""
    given = options_of(args, f"--{'.'.join(WEIGHTS)}", "--policy.weights")
    named = [*(_value_in(*file, *WEIGHTS) for file in files), *given]
    known = [value for value in named if isinstance(value, str)]
    return known[-1] if known else None


def _value_in(path: Path, values: Any, *keys: str) -> Any:
    """A value of a config file, in it or in files that it names; None where it says nothing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, str) and values.endswith(FILE_ENDINGS):
            path = path.parent / values
            values = _read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
    return values


def _asked(parsed: Namespace) -> dict[str, Any]:
    """What a parsed command line asks, as `RunSettings` has it."""
    values = parsed.as_dict()
    data = {name: values["data"][name] for name in SHOWN_BY_DATA}
    return {"family": values["policy"]["init_args"]["family"], "data": data, "sampling": values["sampling"]}


def _as_text(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def show_evaluation(files: EvaluationFiles) -> None:
    """Prints an evaluation's tables, what to know before believing them, and where its files are."""
    console = Console(width=max(TABLE_WIDTH, 36 + 22 * len(files.outcomes)))
    rates = rates_table(files.outcomes, files.results)
    console.print(make_table(rates.head, rates.rows, title=f"{files.results['benchmark']}, in percent"))
    for outcome in files.outcomes:
        summary = outcome.summary
        if summary is None:
            continue
        robust = summary.lenient_scores
        by_rule = summary.protocol_scores
        rows = [
            [name, percent(score), percent(robust[name]), *([percent(by_rule[name])] if by_rule else []), str(score.n)]
            for name, score in summary.scores.items()
        ]
        second = [str(files.results["protocol"]["rule_name"])] if by_rule else []
        table = make_table([outcome.name, "strict", "robust", *second, "n"], rows)
        for field, by_value in summary.breakdowns.items():
            table.add_section()
            for value, score in by_value.items():
                table.add_row(f"{field}: {value}", percent(score), *[""] * (1 + len(second)), str(score.n))
        console.print(table)
        for graded in graded_tables(outcome.name, summary):
            console.print(graded, width=TABLE_WIDTH)
    if any(outcome.figures for outcome in files.outcomes):
        figures = figures_table(files.outcomes)
        title = f"as {files.results['protocol']['name']} reports it"
        console.print(make_table(figures.head, figures.rows, title=title))
    for name, text in list_protocol_facts(files.results).items():
        console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
    for text in list_remarks(files.outcomes):
        console.print(text, highlight=False, soft_wrap=True)
    show_comparisons(files.comparisons)
    paths = f"report: {files.report}\nresults: {files.report.with_name(RESULTS_FILE)}"
    console.print(paths, highlight=False, soft_wrap=True)
