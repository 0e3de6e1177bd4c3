"""What is said of completions that a reward could not judge."""

import logging
import re

import pytest
import torch

from longrl.io.processes import lost_worker_in
from longrl.rewards import RewardSum, RewardTerm, accuracy
from longrl.rewards.failures import Failure, hopeless_message
from longrl.types import Completion, Group, Prompt, Row

NO_TOKENS = torch.zeros(0, dtype=torch.long)
DEAD_WORKER = "DataLoader worker (pid 4711) is killed by signal: Killed. "


def group(row: Row, *texts: str) -> Group:
    prompt = Prompt(row.id, NO_TOKENS, NO_TOKENS[None], (), row)
    return Group(prompt, [Completion(NO_TOKENS, torch.zeros(0), text, "stop") for text in texts])


def failures_of(function, *rows: Row) -> list[Failure]:
    failures: list[Failure] = []
    RewardSum([RewardTerm(function, name="mine")]).score([group(row, "a", "b") for row in rows], failures)
    return failures


ROWS = (Row("q1", "2 + 2?", "4", "numeric"), Row("q2", "3 + 3?", "6", "numeric"))


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (lambda completion, row: float(completion.lower() == row.answer), r"its text is completion\.text"),
        (lambda completion, row: float(completion.strip() == row.answer), r"its text is completion\.text"),
        (lambda completion, row: float("x" in completion), r"its text is completion\.text"),
        (lambda completion, row: len(completion), r"its text is completion\.text"),
        (
            lambda completion, row: float(bool(re.search("x", completion))),
            r"its text is completion\.text|a reward gets",
        ),
        (lambda completion, row: completion["text"], r"its text is completion\.text"),
        (lambda completion, row: float(completion.text == row["answer"]), r"ground truth is row\.answer"),
        (lambda completion, row: float(completion.text == row.get("answer")), r"ground truth is row\.answer"),
        (lambda completion, row: float(completion.text == row.solution), r"ground truth is row\.answer"),
        (lambda completion, row: float(completion.text == row.metadata["answer"]), r"ground truth is row\.answer"),
        (
            lambda completion, row: float(completion.text == row.metadata["ground_truth"]),
            r"ground truth is row\.answer",
        ),
        (lambda completion, row: (completion.text, 1), r"one finite number for each completion, or None"),
        (lambda completion, row: float("nan"), r"one finite number for each completion, or None"),
        (lambda completion, row: float("inf"), r"one finite number for each completion, or None"),
        (lambda completion, row: accuracy(completion, Row("q", "?", "tea", "open_ended")), r"judge\.yaml and text_sim"),
    ],
)
def test_the_hint_fits_the_mistake(function, hint):
    failures = failures_of(function, *ROWS)
    assert len(failures) == 4
    message = hopeless_message(failures, 4)
    assert message is not None
    assert re.search(hint, message.split("; ", 1)[1])
    assert "reward 'mine' failed on every one of the 4 completions so far, of row 'q1', 'q2'" in message


def test_the_last_line_of_the_rewards_own_file_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef parsed(completion, row):\n    return json.loads(completion.text)['score']\n")
    (failure, *_) = failures_of(f"{file}:parsed", ROWS[0])
    assert failure.place == f"{file} line 4"
    assert failure.error.startswith("JSONDecodeError: ")


def test_what_an_error_says_cannot_act_on_a_terminal():
    def fails(completion, row):
        raise ValueError("\x1b[2J gone\nand more")

    (failure, *_) = failures_of(fails, ROWS[0])
    assert failure.error == "ValueError: \\x1b[2J gone and more"


def test_failures_of_one_kind_are_one_line_with_their_number(caplog):
    def judge(completion, row):
        if completion.text == "b":
            raise KeyError(row.id)
        if row.id == "q2":
            raise ValueError("no")
        return 1.0

    rows = [Row(f"q{number}", "?", "4", "numeric") for number in range(9)]
    with caplog.at_level(logging.WARNING):
        failures_of(judge, *rows)
    first, second = (record.getMessage() for record in caplog.records)
    assert "failed on 9 of 18 completions, of row 'q0', 'q1', 'q2', 'q3', 'q4' and 4 more (KeyError: 'q0', in" in first
    assert "failed on 1 of 18 completions, of row 'q2' (ValueError: no, in" in second


def test_one_row_or_one_good_completion_or_several_kinds_end_no_run():
    failures = failures_of(lambda completion, row: completion.lower(), *ROWS)
    assert hopeless_message(failures, 4)
    assert hopeless_message(failures, 5) is None
    assert hopeless_message(failures[:2], 2) is None
    other = [Failure("mine", "q1", "KeyError: 'x'", "f.py line 2", ""), Failure("mine", "q2", "ValueError", "", "")]
    assert hopeless_message(other, 2) is None
    assert hopeless_message([], 0) is None


# ---- torch tells the main thread of a dead loader worker by an exception, wherever it is ----


def raises_it(completion, row):
    raise RuntimeError(DEAD_WORKER)


def wraps_it(completion, row):
    try:
        raise RuntimeError(DEAD_WORKER)
    except RuntimeError as error:
        raise ValueError("my reward failed") from error


def hides_it(completion, row):
    try:
        raise RuntimeError(DEAD_WORKER)
    except RuntimeError:
        raise KeyError("answer")  # noqa: B904


def in_columns(completions, **columns):
    raise RuntimeError(DEAD_WORKER)


@pytest.mark.parametrize("function", [raises_it, wraps_it, hides_it, in_columns])
def test_a_dead_loader_worker_is_no_failure_of_the_reward(function):
    with pytest.raises((RuntimeError, ValueError, KeyError)) as error:
        failures_of(function, *ROWS)
    assert lost_worker_in(error.value)


def test_another_runtime_error_is_the_rewards_own():
    def judge(completion, row):
        raise RuntimeError("my DataLoader worker (pid 3) is killed")

    assert len(failures_of(judge, *ROWS)) == 4
