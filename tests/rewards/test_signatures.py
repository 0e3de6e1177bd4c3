"""Reward functions as TRL and verl call them."""

import functools
import re

import pytest
import torch

from longrl.rewards import ColumnReward, RewardSum, RewardTerm, SoftOverlong
from longrl.rewards.signatures import ComputeScore, as_reward
from longrl.types import Completion, Group, Prompt, Row
from tests.rewards.test_failures import group

ROWS = (
    Row("q1", "2 + 2?", "4", "numeric", metadata={"difficulty": 1}),
    Row("q2", "3 + 3?", "6", "numeric", metadata={"difficulty": 2, "data_source": "sums"}),
)


def rewards_of(function, texts=(("4", "5"), ("6", "x"))) -> list[list[float]]:
    groups = [group(row, *of_row) for row, of_row in zip(ROWS, texts, strict=True)]
    RewardSum([RewardTerm(function, name="mine")]).score(groups)
    assert all(one.valid.all() for one in groups)
    return [one.rewards.tolist() for one in groups]


# ---- TRL ----


def only_completions(completions, **kwargs):
    return [float(len(text)) for text in completions]


def with_answer(prompts, completions, answer, **kwargs):
    return [float(text == truth) for text, truth in zip(completions, answer, strict=True)]


def with_solution(completions, solution):
    return [float(text == truth) for text, truth in zip(completions, solution, strict=True)]


def with_keywords(completions, **kwargs):
    assert kwargs["prompts"] == ["2 + 2?"] * 2 + ["3 + 3?"] * 2
    assert kwargs["task"] == ["numeric"] * 4
    assert kwargs["data_source"] == [None, None, "sums", "sums"]
    assert [list(ids) for ids in kwargs["completion_ids"]] == [[], [], [], []]
    return torch.tensor([float(one) for one in kwargs["difficulty"]])


async def awaited(completions, **kwargs):
    return only_completions(completions)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (only_completions, [[1.0, 1.0], [1.0, 1.0]]),
        (with_answer, [[1.0, 0.0], [1.0, 0.0]]),
        (with_solution, [[1.0, 0.0], [1.0, 0.0]]),
        (with_keywords, [[1.0, 1.0], [2.0, 2.0]]),
        (awaited, [[1.0, 1.0], [1.0, 1.0]]),
        (functools.partial(with_answer, extra=3), [[1.0, 0.0], [1.0, 0.0]]),
    ],
)
def test_a_function_of_trl_gets_columns_and_gives_a_list(function, expected):
    assert rewards_of(function) == expected


def test_conversational_functions_get_messages_where_they_say_so(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, completions, **kwargs):\n"
        "    assert prompts[0][0]['role'] == 'user'\n"
        "    return [float(len(messages[0]['content'])) for messages in completions]\n"
    )
    reward = ColumnReward(f"{file}:length", conversational=True)
    assert rewards_of(reward, (("a", "bb"), ("ccc", ""))) == [[1.0, 2.0], [3.0, 0.0]]
    assert RewardTerm(reward).name == "length"


def test_a_conversational_function_without_saying_so_is_told_how(caplog):
    def judge(completions, **kwargs):
        return [1.0 if messages[0]["content"] else 0.0 for messages in completions]

    RewardSum([RewardTerm(judge)]).score([group(ROWS[0], "4")])
    assert "class_path longrl.rewards.ColumnReward with conversational: true" in caplog.text


def test_none_in_a_list_leaves_the_part_out():
    def only_sums(completions, data_source, **kwargs):
        return [1.0 if source == "sums" else None for source in data_source]

    groups = [group(row, "4") for row in ROWS]
    RewardSum([RewardTerm(only_sums), RewardTerm(only_completions)]).score(groups)
    assert [one.rewards.tolist() for one in groups] == [[1.0], [2.0]]
    assert groups[0].reward_parts["only_sums"].isnan().all()


def test_a_column_that_rows_lack_is_missed_before_the_run():
    def judge(completions, difficulty, tolerance, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(
        ValueError, match=r"reward 'judge' needs the column 'tolerance', which row 'q1' does not have; "
    ):
        RewardSum([RewardTerm(judge)]).check_rows(ROWS, "train")
    RewardSum([RewardTerm(with_answer)]).check_rows(ROWS, "train")
    RewardSum([RewardTerm(functools.partial(judge, tolerance=1))]).check_rows(ROWS, "train")


def test_a_list_of_another_length_fails_with_its_name(caplog):
    RewardSum([RewardTerm(lambda completions, **kwargs: [1.0], name="mine")]).score([group(ROWS[0], "a", "b")])
    assert re.search(r"must return a value of each of the 2 completions, got 1", caplog.text)


# ---- verl ----


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert extra_info["question"] in ("2 + 2?", "3 + 3?")
    return {"score": float(solution_str == ground_truth), "seen": data_source}


def plain_score(solution_str, ground_truth):
    return float(solution_str == ground_truth)


async def async_score(data_source, solution_str, ground_truth, extra_info):
    return float(data_source == "sums")


def long_rl_score(predict_str, ground_truth, format_weight=0.1):
    return {"overall": float(predict_str == ground_truth), "format": format_weight}


def test_a_function_of_verl_is_called_by_its_names():
    assert rewards_of(long_rl_score) == [[1.0, 0.0], [1.0, 0.0]]
    assert rewards_of(compute_score) == rewards_of(plain_score) == [[1.0, 0.0], [1.0, 0.0]]
    assert rewards_of(async_score) == [[0.0, 0.0], [1.0, 1.0]]
    assert isinstance(as_reward(compute_score), ComputeScore)
    assert RewardTerm(compute_score).name == "compute_score"


# ---- others ----


def three(completion, row, weight):
    return 1.0


def none_at_all():
    return 1.0


def of_batches(reward_inputs, format_weight=0.1):
    return [1.0]


def queries(queries, prompts, labels):
    return [1.0]


def keyword_only(completion, *, row):
    return 1.0


@pytest.mark.parametrize("function", [three, none_at_all, queries, keyword_only])
def test_what_cannot_be_called_is_an_error_at_the_start_that_names_the_forms(function):
    with pytest.raises(
        ValueError, match=r"reward '\w+' has the parameters \(.*\(completion, row\) -> float.*TRL's.*verl's"
    ):
        RewardTerm(function)


@pytest.mark.parametrize(
    "function",
    [lambda c, r: 1.0, lambda frames, row: 1.0, lambda *args: 1.0, lambda completion, row, weight=2: 1.0, max,
     SoftOverlong(8, 4), functools.partial(three, weight=1)],
)  # fmt: skip
def test_what_takes_two_is_left_as_it_is(function):
    assert as_reward(function) is function


def test_columns_of_pictures_are_their_frames():
    class Picture:
        frames = torch.ones(1, 3, 2, 2, dtype=torch.uint8)

    made = Group(Prompt("p", torch.zeros(0), torch.zeros(1, 0), (), ROWS[0]), [Picture(), Picture()])
    RewardSum([RewardTerm(lambda completions, **kwargs: [float(one.sum()) for one in completions], name="m")]).score(
        [made]
    )
    assert made.rewards.tolist() == [12.0, 12.0]


def test_a_completion_has_ids():
    def count(completions, completion_ids, **kwargs):
        return [len(ids) for ids in completion_ids]

    answers = group(ROWS[0], "")
    answers.completions = [Completion(torch.arange(3), torch.zeros(3), "abc", "stop")]
    RewardSum([RewardTerm(count)]).score([answers])
    assert answers.rewards.tolist() == [3.0]
