"""One spelling of texts with numbers."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.plain_numbers import MAX_NUMBER_CHARS, end_of_text, last_boxed, plain_number_text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("3\u00b2", "3^2"),
        ("1\u00bd", "1 1/2"),
        ("\uff11\uff12", "12"),
        (r"1\,234\text{ cm}", "1234 cm"),
        (r"1{,}234", "1,234"),
        (r"45^{\circ}", "45\u00b0"),
        ("**42**", "42"),
        ("2**3", "2**3"),
        ("`42`", "42"),
        ("<b>42</b>", "42"),
        ("-$5", "-5"),
        ("\u22125", "-5"),
        ("3\ufe0f\u20e3", "3"),
    ],
)
def test_wrappers_go_and_meanings_stay(text, plain):
    assert " ".join(plain_number_text(text).split()) == plain


@given(st.text(max_size=200).map(lambda text: text * 20))
def test_a_text_is_bounded_whatever_it_expands_to(text):
    assert len(plain_number_text(text)) <= 2 * MAX_NUMBER_CHARS


def test_a_word_that_is_cut_is_left_out():
    assert end_of_text("12345 678", 7) == " 678"
    assert end_of_text("12345678", 4) == ""
    assert end_of_text("12 34", 9) == "12 34"


def test_the_last_box_is_read_with_its_braces():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("no box") is None
