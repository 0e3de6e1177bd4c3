"""Texts of models, judges, data sets and configs that are made to cost time, memory or the process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import command, fit, text_rows, text_run
from longrl.chat.endpoint import read_reply
from longrl.io.append_log import AppendLog
from longrl.rewards.reward_sum import LENIENT_ACCURACY
from longrl.types import Completion, Row

LIMIT_MS = 500
"""For 100 kB; 50 ms for each 10 kB."""
PROBLEM = "Which?\nA. a cat\nB. a dog\nC. a hen"
TRUTHS = {
    "multiple_choice": "B", "exact": "B", "ocr": "the dog runs", "free_form": "the dog runs",
    "temporal_iou": "1 to 2 s", "box_iou": '{"1": [1, 2, 3, 4]}', "numeric": "3", "regression": "3", "math": "x^2",
}  # fmt: skip
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def judged(text: str, tasks: tuple[str, ...] = tuple(TRUTHS)) -> Callable[[Path], Outcome]:
    """An answer as every kind of question judges it."""

    def does(folder: Path) -> Outcome:
        completion = Completion(torch.zeros(0), torch.zeros(0), text, "stop")
        slowest = 0.0
        scores = {}
        for task in tasks:
            row = Row("r", PROBLEM, TRUTHS[task], task, "general")
            LENIENT_ACCURACY[task](Completion(torch.zeros(0), torch.zeros(0), "x + x", "stop"), row)  # starts math
            started = time.process_time()
            scores[task] = LENIENT_ACCURACY[task](completion, row)
            slowest = max(slowest, 1000 * (time.process_time() - started))
        within = "within" if slowest <= LIMIT_MS else f"{slowest:.0f} ms, beyond"
        chosen = scores.get("multiple_choice")
        return Outcome(f"{len(text)} characters judged {within} {LIMIT_MS} ms, choice {chosen}", 0, "the score")

    return does


def refused_reply(content: bytes) -> Callable[[Path], Outcome]:
    """A server's answer as a judge's or the pipeline's."""

    def does(folder: Path) -> Outcome:
        try:
            return Outcome(read_reply(content)[1].text, 0, "the reply")
        except ValueError as error:
            return Outcome(f"garbled: {error}", 0, "the run; it is asked again")

    return does


def journal(folder: Path) -> Outcome:
    """Lines that somebody else wrote into a journal."""
    AppendLog(folder / "log").append("a", {"response": 1})
    (folder / "log" / "other.jsonl").write_bytes(b'{"key":' * 50_000 + b'\n{"key": [1]}\n\xff\xfe\n')
    log = AppendLog(folder / "log").open()
    return Outcome(f"{log.num_torn} lines not read, {len(log)} kept", 0, "the replies")


def config(text: str) -> Callable[[Path], Outcome]:
    """`fit` with a config file of this text."""

    def does(folder: Path) -> Outcome:
        (folder / "bad.yaml").write_text(text)
        ended = command(["fit", "--config", str(folder / "bad.yaml")], folder)
        return Outcome(ended.last_line, ended.exit_code, "nothing was started")

    return does


def data(row: Any, **options: Any) -> Callable[[Path], Outcome]:
    """`fit` on rows of which one is this."""

    def does(folder: Path) -> Outcome:
        values = text_run(folder, rows=[*text_rows(3), row, *text_rows(4)], steps=2)
        values["data"] |= options
        ended = fit(folder, values)
        return Outcome(ended.last_line, ended.exit_code, "nothing was started")

    return does


DEEP = b'{"choices":[' * 50_000
PARTS = b'{"choices":[{"message":{"content":[{"type":"text","text":"SCORE: 1"}]}}]}'
FAULTS = [
    Fault("parsers", "an answer with a rule of 30 dashes", judged("Option B is right.\n" + "-" * 30), 0, "within"),
    Fault("parsers", "an answer with a rule of 10,000 dashes", judged("B\n" + "-" * 10_000), 0, "within 500 ms"),
    Fault("parsers", "100 kB of <answer> tags", judged("<answer>" * 12_500), 0, "within 500 ms"),
    Fault("parsers", "100 kB of digits and brackets", judged("([{1," * 20_000), 0, "within 500 ms"),
    Fault("judges", "a reply nested 100,000 deep", refused_reply(DEEP), 0, "garbled: more than 100 lists"),
    Fault("judges", "a reply whose content is a list", refused_reply(PARTS), 0, "^SCORE: 1$"),
    Fault("judges", "a journal with lines of others", journal, 0, "3 lines not read, 1 kept"),
    Fault("records", "a row nested 100,000 deep", data('{"a":' * 100_000), 2, "line 4 of .* is no JSON: more than"),
    Fault("configs", "aliases that mean billions of values", config(LAUGHS), 2, "no YAML: more than 1000000 values"),
    Fault("configs", "lists 100,000 deep", config("a: " + "[" * 100_000), 2, "no YAML: lists and mappings"),
]
