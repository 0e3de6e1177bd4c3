"""Answers without what only lays them out."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.plain_text import GAP, KEPT_CHARS, plain_text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("**B**", "B"),
        ("`B`", "B"),
        ("### B", "B"),
        ("> B", "B"),
        ("\uff22\u3002", "B\u3002"),  # full width
        ("'B'", "B"),
        ("\u201cB\u201d", "B"),
        ("B isn't A's", "B isn't A's"),
        (r"$\boxed{\text{B}}$", "answer: B"),
        (r"\fbox{B}", "answer: B"),
        (r"\textbf{(B)}~\text{cats}", "(B) cats"),
        ("B<|im_end|></s>", "B"),
        ("<b>B</b>", "B"),
        ("<B>", "<B>"),
        ("B<br/>C", "B\nC"),
        ("<tr><td>A</td><td>no</td></tr>", "| A | | no |"),
        ("<answer>B", "answer: B"),
        ("A &amp; B&nbsp;", "A & B"),
        ('{"answer": "B"}', "answer : B"),
        ("```\nB\n```", "B"),
        ("[x] A\n[ ] B", "\u2713 A\n\u2717 B"),
        ("~~A~~ B", "B"),
        ("A -> B", "A : B"),
        ("a  b \n\n c", "a b\nc"),
    ],
)
def test_only_the_words_stay(text, plain):
    assert plain_text(text) == plain


def test_of_a_long_text_both_ends_stay():
    assert plain_text("a" * KEPT_CHARS + "b" * 9999 + "c" * KEPT_CHARS) == "a" * KEPT_CHARS + GAP + "c" * KEPT_CHARS


@given(st.text() | st.text(alphabet="\ufdfa\u0301<>&#;\\ \n", min_size=100))
def test_no_text_grows_beyond_the_two_ends(text):
    assert len(plain_text(text * 300)) <= 4 * KEPT_CHARS
