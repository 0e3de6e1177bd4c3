"""Think and answer tags, and the rewards of answers to multiple choice."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.answers import (
    after_thinking,
    answer_text,
    lenient_text,
    multiple_choice,
    multiple_choice_lenient,
    think_answer_format,
)
from longrl.types import Completion, Row

PROBLEM = "What is shown?\nA. A man is walking\nB. Cats and dogs\nC. A red car\nD. car"


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop")


def row(answer: str = "B", problem: str = PROBLEM) -> Row:
    return Row(id="1", problem=problem, answer=answer)


def test_strict_reads_the_answer_tag_only():
    assert multiple_choice(completion("<think>C?</think><answer>B</answer>"), row()) == 1.0
    assert multiple_choice(completion("The answer is B"), row()) == 0.0
    assert multiple_choice(completion("<answer>A or B</answer>"), row()) == 0.0
    assert multiple_choice(completion("<answer>B</answer>"), row(answer=" b ")) == 1.0


def test_lenient_falls_back_to_the_text_after_the_thinking():
    assert multiple_choice_lenient(completion("<think>maybe A</think>The answer is B"), row()) == 1.0
    assert multiple_choice_lenient(completion("The answer is B"), row()) == 1.0
    assert multiple_choice_lenient(completion("<think>it could be B"), row()) == 0.0
    assert multiple_choice_lenient(completion("<answer>A</answer> The answer is B"), row()) == 0.0


# ---- tags ----

ROW = Row(id="1", problem="?", answer="B")


def has_form(text: str) -> float:
    return think_answer_format(Completion((), (), text, "stop"), ROW)


@pytest.mark.parametrize(
    "text",
    [
        "<think>Tea.</think><answer>B</answer>",
        "  <think>Tea.\n\nMore.</think>\n\n<answer>\nB\n</answer>\n",
        "<think>1 < 2 and <b></think><answer>B</answer>",
    ],
)
def test_one_think_block_and_one_answer_block_have_the_form(text):
    assert has_form(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "<answer>B</answer>",
        "<think>Tea.</think>",
        "<think>Tea.</think><answer>B",
        "<think>Tea.<answer>B</answer>",
        "<answer>B</answer><think>Tea.</think>",
        "So: <think>Tea.</think><answer>B</answer>",
        "<think>Tea.</think> so <answer>B</answer>",
        "<think>Tea.</think><answer>B</answer> Done.",
        "<think>Tea.</think><answer>B</answer><answer>C</answer>",
        "<think>Tea.<think></think><answer>B</answer>",
        "<think>Tea.<answer></think>B</answer>",
        "<think> </think><answer>B</answer>",
        "<think>Tea.</think><answer> </answer>",
        "<Think>Tea.</Think><answer>B</answer>",
    ],
)
def test_anything_else_has_not(text):
    assert has_form(text) == 0.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>B</answer>", "B"),
        ("<think>x</think>\n<answer>\n B. cats \n</answer> bye", "B. cats"),
        ("<answer>A</answer> no: <answer>B</answer>", "B"),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>x <answer>B</answer>", "B"),
        ("<ANSWER>B</ANSWER >", "B"),
        ("<think>I forgot to stop. <answer>B</answer>", "B"),
        ("<think><answer>A</answer></think>", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("<answer> </answer>", None),
        ("B", None),
        ("", None),
    ],
)
def test_answer_text_is_the_last_closed_answer_after_the_thinking(text, content):
    assert answer_text(text) == content


@pytest.mark.parametrize(
    ("text", "rest"),
    [("<think>a</think>b", "b"), ("a</think>b", "b"), ("no tag", "no tag"), ("<think>endless", ""), ("x<think>y", "x")],
)
def test_after_thinking_leaves_the_final_statement(text, rest):
    assert after_thinking(text) == rest


@given(st.text(alphabet="<>/thinkaswer AB\n") | st.text())
def test_no_text_breaks_the_readers(text):
    assert answer_text(text) != ""
    assert isinstance(lenient_text(text), str)
    assert has_form(text) in (0.0, 1.0)
