"""English numbers in words, as a whole or not at all."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.number_words import read_phrase
from longrl.rewards.numeric import number

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
ONES = SMALL.split()
LARGE = "- - twenty thirty forty fifty sixty seventy eighty ninety"
TENS = LARGE.split()


def spell(value: int, conjunction: str = "and ", hyphen: str = "-") -> str:
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (hyphen + ONES[value % 10] if value % 10 else "")
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if value >= size:
            rest = value % size
            joint = f" {conjunction if rest < 100 else ''}" if rest else ""
            return f"{spell(value // size, conjunction, hyphen)} {name}{joint}" + (
                spell(rest, conjunction, hyphen) if rest else ""
            )
    raise AssertionError(value)


@given(st.integers(0, 10**10 - 1) | st.integers(0, 9999), st.sampled_from(["and ", ""]), st.sampled_from(["-", " "]))
def test_whole_numbers_in_words_are_read_back(value, conjunction, hyphen):
    assert number(spell(value, conjunction, hyphen)) == value
    assert number(f"There are {spell(value, conjunction, hyphen)} of them.") == value


@given(st.integers(0, 99), st.text(alphabet="0123456789", min_size=1, max_size=6))
def test_decimals_in_words_are_read_back(whole, decimals):
    words = " ".join(ONES[int(digit)] for digit in decimals)
    assert number(f"{spell(whole)} point {words}") == pytest.approx(float(f"{whole}.{decimals}"))


@given(st.integers(1, 99), st.integers(1, 99))
def test_two_numbers_in_a_row_are_none(first, second):
    if first != second and not (first % 10 == 0 and first >= 20 and second < 10):
        assert number(f"{spell(first)} {spell(second)}") is None


@pytest.mark.parametrize(
    ("words", "value", "length"),
    [
        (["two", "thirds"], 2 / 3, 2),
        (["two", "and", "a", "half", "million"], 2.5e6, 5),
        ([5.0, "thousand", "two", "hundred"], 5200, 4),
        (["half", "a", "dozen", "eggs"], 6, 3),
        (["twenty", "first"], 21, 2),
        (["three", "cats"], 3, 1),
        (["nineteen", "eighty", "four"], None, 3),
        (["hundreds"], None, 1),
    ],
)
def test_a_phrase_says_how_many_words_it_takes(words, value, length):
    phrase = read_phrase(words)
    assert phrase is not None
    assert phrase.length == length
    assert phrase.value == (None if value is None else pytest.approx(value))


def test_other_words_begin_with_no_number():
    assert read_phrase(["cats"]) is None
    assert read_phrase(["a", "cat"]) is None
    assert read_phrase([]) is None
