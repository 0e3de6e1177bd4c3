"""`python -m longrl evaluate`: a policy on a benchmark, here or behind an endpoint, with a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console

from longrl.commands.compare import show_comparisons
from longrl.commands.main import COMMAND_USAGE
from longrl.commands.run_config import evaluation_config, set_config_reader
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.benchmark import Evaluation, EvaluationConfig
from longrl.evaluation.benchmark_report import list_remarks, rates_table
from longrl.evaluation.graded_tables import TABLE_WIDTH, graded_tables
from longrl.evaluation.protocol import list_protocol_facts
from longrl.evaluation.result_files import EvaluationFiles
from longrl.evaluation.samples import RESULTS_FILE
from longrl.evaluation.scores import percent
from longrl.io.tables import make_table

DESCRIPTION = """Evaluates a policy on a benchmark; configs/eval/ has examples. The same command goes on where it was
killed: what was answered is not asked again."""
NOT_HERE = frozenset(
    ("family", "train", "val", "stage", "response_template", "answer_template", "blind_share", "prompts_per_batch",
     "max_train_rows", "seed", "prefetch_prompts")
)  # fmt: skip
"""Options of the data module that an evaluation has no use for."""


def main(args: Sequence[str]) -> None:
    """Command line of `evaluate`."""
    files = Evaluation(*parse_evaluation(args)).run()
    if files is not None:
        show_evaluation(files)


def parse_evaluation(args: Sequence[str]) -> tuple[EvaluationConfig, LongVideoReason]:
    """The evaluation and the data that a command line describes; nothing is read or loaded yet."""
    set_config_reader(evaluation_config)
    usage = COMMAND_USAGE.format("python -m longrl", "evaluate")
    parser = ArgumentParser(prog="python -m longrl evaluate", usage=usage, description=DESCRIPTION)
    parser.add_argument("--config", action="config", help="a YAML file; later ones win, key by key")
    parser.add_class_arguments(EvaluationConfig, sub_configs=True)
    parser.add_class_arguments(LongVideoReason, "data", skip=set(NOT_HERE), instantiate=False, sub_configs=True)
    values = parser.instantiate(parser.parse_args(list(args)))
    config = EvaluationConfig(**{item.name: values[item.name] for item in dataclasses.fields(EvaluationConfig)})
    return config, LongVideoReason(config.policy.family, **vars(values.data))


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
    for name, text in list_protocol_facts(files.results).items():
        console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
    for text in list_remarks(files.outcomes):
        console.print(text, highlight=False, soft_wrap=True)
    show_comparisons(files.comparisons)
    paths = f"report: {files.report}\nresults: {files.report.with_name(RESULTS_FILE)}"
    console.print(paths, highlight=False, soft_wrap=True)
