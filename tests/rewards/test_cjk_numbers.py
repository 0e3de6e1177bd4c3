"""Numbers in Chinese characters."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.cjk_numbers import read_cjk_numeral
from longrl.rewards.numeric import number

DIGITS = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d"
PLACES = ("\u5343", 1000), ("\u767e", 100), ("\u5341", 10)


def spell(value: int) -> str:
    """As Chinese writes 0 to 99,999,999."""
    if value >= 10_000:
        rest = value % 10_000
        return spell(value // 10_000) + "\u4e07" + ((DIGITS[0] if rest < 1000 else "") + spell(rest) if rest else "")
    text, gap = "", False
    for name, size in PLACES:
        digit, value = divmod(value, size)
        if digit:
            text += (DIGITS[0] if gap else "") + DIGITS[digit] + name
        gap = bool(text) and not digit
    if value or not text:
        text += (DIGITS[0] if gap else "") + DIGITS[value]
    return text


@given(st.integers(0, 99_999_999) | st.integers(0, 999))
def test_chinese_numerals_are_read_back(value):
    assert read_cjk_numeral(spell(value)) == value
    assert number(f"\u4e00\u5171\u6709{spell(value)}\u4e2a\u3002") == value  # there are .. in all
    assert number(f"\u7b2c{spell(value)}\u4e2a") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3\u4e075\u5343", 35000), ("\u4e8c\u3007\u4e8c\u56db", 2024), ("\u4e09\u56db", None), ("\u5341\u5341", None)],
)
def test_mixed_numerals_and_rows_of_digits(text, value):
    assert read_cjk_numeral(text) == value
