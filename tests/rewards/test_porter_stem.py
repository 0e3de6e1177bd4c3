"""Porter's stems, as NLTK 3.9 gives them."""

import time

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.porter_stem import stem_word

STEMS = {
    "running": "run", "happily": "happili", "nationalization": "nation", "generously": "gener", "dying": "die",
    "flies": "fli", "ties": "tie", "ponies": "poni", "hopping": "hop", "hoping": "hope", "relational": "relat",
    "conditional": "condit", "agreed": "agre", "feed": "feed", "plastered": "plaster", "sky": "sky", "sing": "sing",
    "controlling": "control", "falling": "fall", "enjoyed": "enjoy", "geologically": "geolog",
    "archaeology": "archaeolog", "probably": "probabl", "triplicate": "triplic", "electricity": "electr",
    "adoption": "adopt", "is": "is",
}  # fmt: skip


@pytest.mark.parametrize("word", STEMS)
def test_stems_are_those_of_nltk(word):
    assert stem_word(word) == STEMS[word]


@given(st.text(alphabet="aeioustnlgdybcz", min_size=1, max_size=14))
def test_any_word_has_a_stem_no_longer_than_it_by_more_than_a_letter(word):
    assert 0 < len(stem_word(word)) <= len(word) + 1


@pytest.mark.parametrize("letters", ["e", "y", "ya", "b", "eed", "alli"])
def test_a_word_of_any_length_takes_linear_time(letters):
    word = letters * (50_000 // len(letters))
    start = time.process_time()
    assert word.startswith(stem_word(word)[:-1])
    assert time.process_time() - start < 2.0  # 50 ms; 16 s if every vowel begins a search
