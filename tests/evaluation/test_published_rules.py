"""Scoring rules of released code; the expected readings are those of that code, run on the same texts."""

import time

import pytest
import torch

from longrl.evaluation.published_rules import (
    lmms_eval_choice,
    lmms_eval_letter,
    long_rl_exact_letter,
    qwen_choice,
    qwen_option,
    vlmevalkit_capital,
    vlmevalkit_choice,
    vlmevalkit_letter,
    vlmevalkit_option,
)
from longrl.types import Completion, Row

OPTIONS = {"A": "a red cat", "B": "dog", "C": "Bike", "D": "the end"}
PROBLEM = "Which?\n" + "\n".join(f"{letter}. {wording}" for letter, wording in OPTIONS.items())


def scored(rule, text, answer="B"):
    none = torch.empty(0, dtype=torch.int64)
    return rule(Completion(none, torch.empty(0), text, "stop"), Row("1", PROBLEM, answer))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ('"D"', "D"),
        ("B. dog", "B"),
        ("A dog", "A"),  # the article, too
        ("The answer is B", "B"),
        ("The best answer is: (C) because it rides", "C"),
        ("The answer is B because A is red", "A"),  # behind the phrase the last capital counts
        ("**B**", "B"),  # a last resort
        ("Because Dogs bark", "D"),  # so is any capital
        ("B1 or C", "B"),
        ("Blue", "B"),
        ("\uc815\ub2f5\uc740 C", "C"),
        ("\u7b54\u6848\u662fB\u3002", "B"),
        ("dog", ""),
        ("", ""),
        (" \n", ""),
    ],
)
def test_lmms_evals_letter(text, letter):
    assert lmms_eval_choice(text) == letter


def test_lmms_eval_reads_what_follows_the_thinking():
    assert scored(lmms_eval_letter, "<think>It is A or C.</think>\nB") == 1.0
    assert scored(lmms_eval_letter, "It is A or C.</think>\nB") == 1.0
    assert scored(lmms_eval_letter, "<think>It is B") == 1.0  # thinking that never ended counts
    assert scored(lmms_eval_letter, "<analysis>C</analysis> B <think>A</think>") == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>x</think> <answer>B</answer>", True),
        ("<answer> B </answer>", True),
        ("B", True),
        (" B\n", True),
        ("<answer>B</answer> or <answer>A</answer>", True),  # the first tag counts
        ("<answer>B.</answer>", False),
        ("<answer>B. dog</answer>", False),
        ("<answer>b</answer>", False),
        ("<answer>\nB\n</answer>", False),  # a tag over lines is none
        ("The answer is B", False),
        ("<answer>Therefore the final answer is: B</answer>", True),
        ("Therefore the final answer is: <answer>B</answer>", False),
        ("", False),
    ],
)
def test_long_rls_exact_letter(text, right):
    assert scored(long_rl_exact_letter, text) == float(right)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("The answer is (C).", "C"),
        ("A", "A"),
        ("A dog", "A"),
        ("It is A, a red cat", "A"),  # a long answer with A is read by its wording
        ("It is A for sure now", None),
        ("A or B", None),
        ("I see a dog there", "B"),
        ("a dog on a bike", None),
        ("Z", None),
        ("Cannot determine the answer: B", None),
        ("", None),
    ],
)
def test_qwens_option(text, letter):
    assert qwen_choice(text, OPTIONS) == letter


def test_qwen_reads_what_follows_the_thinking():
    assert scored(qwen_option, "It may be A or C.</think>\n\nB") == 1.0
    assert scored(qwen_option, "B or C") == 0.0


@pytest.mark.parametrize(
    ("text", "capital", "option"),
    [
        ("B", "B", "B"),
        ("The answer is (C).", "C", "C"),
        ("A dog", "A", "A"),  # a word of its own, though it is the article
        ("A dog is to be seen here, on the left", "A", "B"),  # not among the last five words, so by its wording
        ("It is a dog", "", "B"),
        ("<think>Bob has a cat</think> C", "B", "C"),  # thinking counts
        ("The best option is D", "D", "D"),
        ("It rides. The answer is **C**, not A", "C", "C"),
        ("the answer is a Bike", "B", "A"),  # small letters count behind the phrase
        ("A or B", "A", None),
        ("Z", "", None),
        ("Failed to obtain answer via API.", "A", None),  # of API
        ("Cannot determine the answer: B", "C", None),
        ("", "", None),
    ],
)
def test_vlmevalkits_letter_and_option(text, capital, option):
    assert vlmevalkit_capital(text) == capital
    assert vlmevalkit_choice(text, OPTIONS) == option


@pytest.mark.parametrize("piece", ["the answer is ", "A ", "<answer>", "<think>", "<think></think>", "Z(", "\u9009B"])
def test_rules_are_quick_on_long_answers(piece):
    text = (piece * 50_000)[:50_000]
    for rule in (lmms_eval_letter, long_rl_exact_letter, qwen_option, vlmevalkit_letter, vlmevalkit_option):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            scored(rule, text)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.25  # 50 ms are allowed; this machine may be busy
