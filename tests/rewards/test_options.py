"""Options that a question lists."""

import string

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.options import option_label, parse_options, with_options


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
    ("index", "label"), [(0, "A"), (25, "Z"), (26, "AA"), (27, "AB"), (51, "AZ"), (52, "BA"), (701, "ZZ"), (702, "AAA")]
)
def test_labels_go_on_behind_z_as_columns_of_a_table(index, label):
    assert option_label(index) == label


def test_more_options_than_letters_are_written_and_read_back():
    wordings = [f"thing {number}" for number in range(60)]
    options = parse_options(with_options("Which?", wordings))
    assert list(options)[24:28] == ["Y", "Z", "AA", "AB"]
    assert list(options.values()) == wordings


@pytest.mark.parametrize(
    "problem",
    [
        "Which?\n1. cat\n2. dog\n3. red hen",
        "Which?\n1) cat\n2) dog\n3) red hen\n\nAnswer with the number.",
        "Which?\n(1) cat\n(2) dog\n(3) red hen",
        "Which? 1. cat 2. dog 3. red hen",
        "Which of 2.5 and 3.5?\n1: cat\n2: dog\n3: red hen",
    ],
)
def test_numbered_options_are_read_alike(problem):
    assert parse_options(problem) == {"1": "cat", "2": "dog", "3": "red hen"}


@pytest.mark.parametrize(
    "problem",
    [
        "1. Heat the pan.\n2. Add eggs.\nHow many steps are left?",
        "At 1:30 and 2:30?",
        "What is\n1.5 + 2.5?",
        "2. b\n3. c",
    ],
)
def test_a_numbered_list_that_is_asked_about_is_none_of_options(problem):
    assert parse_options(problem) == {}


def test_letters_come_before_numbers():
    problem = "In which order?\n1. cut\n2. stir\nA. 1, 2\nB. 2, 1"
    assert parse_options(problem) == {"A": "1, 2", "B": "2, 1"}
