"""The option that an answer settles on."""

import string
import time

import pytest
from hypothesis import given, settings, strategies as st

from longrl.rewards.option_choice import chosen_option

OPTIONS = {"A": "A man is walking", "B": "Cats and dogs", "C": "A red car", "D": "car"}
LETTERS = dict.fromkeys("ABCD", "")
"""Options without wordings, so that letters alone decide."""


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
        ("Correct answer: B\nIncorrect: A, C, D", "B"),
        ("Correct: B\nWrong: A, C", "B"),
        ("My pick: B\nRuled out: A, C, D", "B"),
        ("Answer: B. Distractors: A, C and D", "B"),
        ("B; A is a distractor", "B"),
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


NUMBERED = {"1": "cat", "2": "dog", "3": "red hen"}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("2", "2"),
        ("(2)", "2"),
        ("2. dog", "2"),
        ("Answer: 3", "3"),
        ("It is option 2.", "2"),
        (r"\boxed{2}", "2"),
        ("2 because it barks", "2"),
        ("1 is wrong, 2 is right", "2"),
        ("the red hen", "3"),
        ("I see 2 of them", None),
        ("2 or 3", None),
        ("1, 2", None),
        ("2.5", None),
        ("4", None),
        ("A", None),
    ],
)
def test_numbers_are_labels_where_options_are_numbered(text, label):
    assert chosen_option(text, NUMBERED) == label


@pytest.mark.parametrize(
    ("text", "label"), [("AA", "AA"), ("The answer is AB.", "AB"), ("(ab)", "AB"), ("A", "A"), ("AA or AB", None)]
)
def test_labels_behind_z_are_read_as_whole_ones(text, label):
    assert chosen_option(text, dict.fromkeys(["A", "B", "AA", "AB"], "")) == label


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("feeds the dog", "B"),
        ("a dog", None),
        ("the dog", None),
        ("both", "C"),
        ("Both of them", "C"),
    ],
)
def test_a_part_of_one_wording_stands_for_it(text, letter):
    options = {"A": "The man feeds the cat", "B": "The woman feeds the dog", "C": "Both of them", "D": "The dog sleeps"}
    assert chosen_option(text, options) == letter


def test_a_wording_of_two_options_is_that_of_none():
    assert chosen_option("It is a cat", {"A": "cat", "B": "cat", "C": "dog"}) is None
    assert chosen_option("It is a dog", {"A": "cat", "B": "cat", "C": "dog"}) == "C"


def test_what_follows_the_last_answer_mark_decides():
    assert chosen_option("Answer: A\nI looked again.\nAnswer: B, for A is not shown", OPTIONS) == "B"
    assert chosen_option("B\nFinal answer:\n", OPTIONS) == "B"


def test_both_ends_of_a_long_text_are_read():
    filler = "The video goes on. " * 2000
    assert chosen_option(f"B. {filler}", OPTIONS) == "B"
    assert chosen_option(f"{filler} So the answer is C.", OPTIONS) == "C"
    assert chosen_option(f"{filler} The answer is C. {filler}", OPTIONS) is None


# ---- time ----

FRAGMENTS = [
    *"A-=><([{})]*_`~'\"$|.,!?/\\#&3", " ", "\n", "A ", "A-", "A\u2014", "A. ", "A? ", "A B ", "A, B, C, ", "A or B ",
    "(A) ", "not B ", "B is wrong, ", "A is more likely than B ", "although A ", "all but ", "no, ", "yes ", "very ",
    "A quickly ", "the answer is ", "answer: ", "it is ", "best ", "player A ", "a man ", "a man is ", "cats and ",
    "cats and dogs ", "| A | no |\n", "[ ] ", "[x] ", "\u2717 A ", "\\boxed{", "\\text{", "<b>", "<answer>",
    "</answer>", "<think>", "</think>", "&amp;", "&#", "~~", "\u0301\u0316", "\ufdfa", "\u3300", "\u4e0d\u662f",
    "\u9009A", "A\u548c", "\U0001f600", "\x00", "-\n", "*\n\n", "-", "\n", "\n ",
]  # fmt: skip
LENGTH = 50_000
LIMIT_S = 0.2
"""Four times the 50 ms that an answer of this length may take, for machines that are slow or busy."""


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_no_repeated_fragment_takes_long(fragment):
    for start in ("", "A", "The answer is A"):
        text = (start + fragment * (LENGTH // len(fragment)))[:LENGTH]
        assert min(seconds_of(text) for _ in range(2)) < LIMIT_S


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4), st.sampled_from(["", "A", "B. ", "Answer: "]))
def test_no_mixture_of_fragments_takes_long(fragments, start):
    text = (start + "".join(fragments) * LENGTH)[:LENGTH]
    assert min(seconds_of(text) for _ in range(2)) < LIMIT_S


def seconds_of(text: str) -> float:
    start = time.process_time()
    chosen_option(text, OPTIONS)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("the second option", "B"),
        ("The first option is wrong, the third option fits", "C"),
        ("The last one.", "D"),
        ("second", "B"),
        ("the fifth option", None),
        ("B happens first", "B"),
        ("My first option was A, but it is C", "C"),
    ],
)
def test_options_may_be_named_by_their_place(text, letter):
    assert chosen_option(text, dict(zip("ABCD", ("cat", "dog", "hen", "fox"), strict=True))) == letter


def test_places_of_events_are_no_places_of_options():
    options = {"A": "The dog comes first", "B": "The cat comes first", "C": "The last one", "D": "Both"}
    assert chosen_option("the last one", options) == "C"
    assert chosen_option("the first option", options) is None
