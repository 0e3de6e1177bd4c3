"""Think and answer tags, and the option a text settles on."""

import string

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.answers import (
    after_thinking,
    answer_text,
    chosen_option,
    lenient_text,
    multiple_choice,
    multiple_choice_lenient,
    parse_options,
    think_answer_format,
)
from longrl.types import Completion, Row

OPTIONS = {"A": "A man is walking", "B": "Cats and dogs", "C": "A red car", "D": "car"}
LETTERS = dict.fromkeys("ABCD", "")
"""Options without wordings, so that letters alone decide."""
PROBLEM = "What is shown?\n" + "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items())


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop")


def row(answer: str = "B", problem: str = PROBLEM) -> Row:
    return Row(id="1", problem=problem, answer=answer)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        ("a", "A"),
        ("(B) Dogs chase cats", "B"),
        ("B. Cats", "B"),
        ("B.Cats", "B"),
        ("B: cats", "B"),
        ("B - cats", "B"),
        ("**B**", "B"),
        ("$B$", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("\uff08B\uff09", "B"),
        ("\u7b54\u6848\u662fB", "B"),
        ("<answer>B</answer>", "B"),
        ("The answer is B. Cats and Dogs", "B"),
        ("The answer is B. Cats and Dogs run", "B"),
        ("The best answer is: (B) Dogs chase Cats", "B"),
        ("ANSWER: (b)", "B"),
        ("answer:\n\nD", "D"),
        ("the answer is d because a dog barks", "D"),
        ("Final Answer: **C**", "C"),
        ("So the final answer is therefore option (C).", "C"),
        ("The answer to the question is B", "B"),
        ("The answer is likely B", "B"),
        ("The answer should be A, as the man waves", "A"),
        ("C is my answer", "C"),
        ("B is the answer", "B"),
        ("D is the best choice.", "D"),
        ("I'd go with C.", "C"),
        ("I think it's B", "B"),
        ("Based on the video, D", "D"),
    ],
)
def test_a_stated_letter_is_found(text, letter):
    assert chosen_option(text, LETTERS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("option C because A and B are wrong", "C"),
        ("The correct option is C because A and B are wrong. D is wrong too.", "C"),
        ("A man is walking. So the answer is C", "C"),
        ("The answer is: A man is walking. (C)", "C"),
        ("The correct answer is option A: a man", "A"),
        ("A because the man walks", "A"),
        ("B, because A is not shown", "B"),
        ("Option C is correct, option A is wrong.", "C"),
        ("Option A is wrong. Option C is correct.", "C"),
        ("The answer is not A but C", "C"),
        ("The answer isn't A, it's B", "B"),
        ("The answer is C, A and B are wrong", "C"),
        ("The answer is C and A is wrong", "C"),
        ("A, B and C are wrong so D", "D"),
        ("All of A, B, C are wrong, leaving D", "D"),
        ("rule out A and B. It is D", "D"),
        ("It can't be A. It must be D.", "D"),
        ("It's not A. It's not B. It's not D. Hence, C remains", "C"),
        ("Neither A nor B; hence C.", "C"),
        ("A is incorrect. B is incorrect. C", "C"),
        ("A shows a cat but B shows a dog, so B", "B"),
        ("Comparing option A and option B, therefore option B", "B"),
        ("Between A and B I pick A", "A"),
        ("I choose B over A", "B"),
        ("D, not C", "D"),
        ("The answer is A. Wait: the answer is B.", "B"),
        ("A) cat\nB) dog\nC) cow\nAnswer: B", "B"),
        ("The man picks up a cup. A and C do not mention it, B does.", "B"),
    ],
)
def test_other_letters_in_the_text_do_not_distract(text, letter):
    assert chosen_option(text, LETTERS) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "E",
        "A man is walking",
        "the answer is a man",
        "Because the dog barks",
        "I am sure",
        "A-frame house",
        "D.C. is the capital",
        "None of the above",
        "The wrong answer is A",
        "A or B",
        "A and B",
        "A, B",
        "B/C",
        "A or rather B",
        "The answer is A or B.",
        "The answer is A, B, and C",
        "both A and B are correct",
        "(A) cat (B) dog (C) cow (D) hen",
        "a b c d",
    ],
)
def test_no_letter_is_made_up_and_hedging_does_not_pay(text):
    assert chosen_option(text, LETTERS) is None


@given(st.text())
def test_any_text_gives_an_option_or_none(text):
    assert chosen_option(text, LETTERS) in {"A", "B", "C", "D", None}
    assert chosen_option(text, OPTIONS) in {*OPTIONS, None}


FORMS = [
    "{}",
    "({})",
    "{}.",
    "{})",
    "Answer: {}",
    "The answer is {}.",
    "the correct option is ({})",
    "**{}**",
    "Option {}",
]


@given(
    letter=st.sampled_from(string.ascii_uppercase[:8]), form=st.sampled_from(FORMS), tail=st.sampled_from(["", "\n"])
)
def test_every_usual_form_gives_its_letter(letter, form, tail):
    assert chosen_option(form.format(letter) + tail, {}) == letter


@given(
    letters=st.lists(st.sampled_from("ABCD"), min_size=2, max_size=4, unique=True), joint=st.sampled_from([" or ", "/"])
)
def test_offering_several_letters_gives_none(letters, joint):
    assert chosen_option(f"The answer is {joint.join(letters)}", LETTERS) is None


@pytest.mark.parametrize(
    "text", ["A, B and C or " * 500, "best " * 4000, "(A) " * 3000, "is not " * 3000, " " * 20000 + "B"]
)
def test_a_long_degenerate_text_takes_no_time(text):
    chosen_option(text, OPTIONS)  # a quadratic pattern would take minutes


@pytest.mark.parametrize(
    "problem",
    [
        "Which?\nA. cat\nB. dog\nC. red hen",
        "Which?\n(A) cat\n(B) dog\n(C) red hen\nAnswer with the letter.",
        "Which?\nA) cat\n\nB) dog\n\nC) red hen",
        "Which? (A) cat (B) dog (C) red hen",
        "Which? A. cat B. dog C. red hen",
        "Which? Options: A: cat, B: dog, C: red hen",
        "Does A. Smith own it?\nA. cat\nB. dog\nC. red hen",
        "Which?\n**A.** cat\n**B.** dog\n**C.** red hen\n\nThink first.",
    ],
)
def test_options_are_read_in_every_usual_form(problem):
    assert parse_options(problem) == {"A": "cat", "B": "dog", "C": "red hen"}


@pytest.mark.parametrize("problem", ["How many?", "A. only one", "B. no\nC. first", ""])
def test_a_text_without_two_options_from_a_on_has_none(problem):
    assert parse_options(problem) == {}


LINE = st.text(alphabet=string.ascii_lowercase + " ", min_size=1).map(str.strip).filter(bool)


@given(st.lists(LINE, min_size=2, max_size=10))
def test_written_options_are_read_back(texts):
    options = {chr(ord("A") + i): " ".join(text.split()) for i, text in enumerate(texts)}
    assert parse_options("Which?\n" + "\n".join(f"{k}. {v}" for k, v in options.items())) == options


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A man is walking", "A"),
        ("The answer is a man is walking.", "A"),
        ("cats and dogs!", "B"),
        ("It shows a red car.", "C"),
        ("a car", "D"),
        ("a boat", None),
        ("cats and dogs, or a man is walking", None),
        ("B. A red car", "B"),
    ],
)
def test_an_options_wording_stands_for_its_letter(text, letter):
    assert chosen_option(text, OPTIONS) == letter


def test_a_letter_that_is_another_options_wording_is_read_as_a_letter():
    assert chosen_option("B", {"A": "B", "B": "A"}) == "B"


def test_without_parsed_options_the_first_eight_letters_count():
    assert chosen_option("The answer is F", {}) == "F"


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
