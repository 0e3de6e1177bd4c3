"""Numerals with separators."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.number_tokens import parse_numeral, tokenize
from longrl.rewards.numeric import number


@given(st.integers(0, 10**12), st.sampled_from([",", " ", "'", "_"]), st.integers(0, 99))
def test_thousands_are_read_back_whatever_parts_them(value, separator, cents):
    written = f"{value:,}".replace(",", separator)
    assert number(written) == value
    assert number(f"{written}.{cents:02}") == pytest.approx(value + cents / 100)


@given(st.integers(1000, 10**9), st.integers(0, 99))
def test_continental_numerals_are_read_back(value, cents):
    written = f"{value:,}".replace(",", ".") + f",{cents:02}"
    assert number(written) == pytest.approx(value + cents / 100)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234", 1234), ("1.234", 1.234), ("3,5", 3.5), ("0,125", 0.125), ("12,34,567", 1234567), ("1e-3", 0.001),
     ("1,2,3", None), ("1.2.3", None), ("1,23,4", None), ("12.34,5", None)],
)  # fmt: skip
def test_a_separator_means_what_its_place_says(text, value):
    assert parse_numeral(text) == value


def test_tokens_are_the_parts_of_a_text():
    kinds = [(token.kind, token.text) for token in tokenize(r"x1 = \frac{3}{4} of 1 234 km")]
    assert kinds[:3] == [("name", "x1"), ("sign", "="), ("command", r"\frac")]
    assert ("numeral", "1 234") in kinds
