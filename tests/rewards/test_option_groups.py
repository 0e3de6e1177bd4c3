"""Options that a text names together."""

import pytest

from longrl.rewards.option_groups import group_mentions
from longrl.rewards.option_mentions import letter_mentions
from longrl.rewards.option_stance import Stance

OPTIONS = dict.fromkeys("ABCD", "")


def groups_of(text):
    return group_mentions(text, letter_mentions(text, OPTIONS, []))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("A, C and D are wrong, B fits.", {"ACD": "REJECTED", "B": "RIGHT"}),
        ("It's not A, C or D", {"ACD": "REJECTED"}),
        ("not A, B", {"A": "REJECTED", "B": "NAMED"}),
        ("The answer is C, A and B are wrong", {"C": "CHOSEN", "AB": "REJECTED"}),
        ("The answer is C and A is wrong", {"C": "CHOSEN", "A": "REJECTED"}),
        ("B is more likely than A", {"B": "RIGHT", "A": "REJECTED"}),
        ("A is less likely than B", {"A": "REJECTED", "B": "RIGHT"}),
        ("all but B are wrong", {"B": "RIGHT"}),
        ("A is wrong, C too", {"A": "REJECTED", "C": "REJECTED"}),
        ("A \u2717 B \u2713", {"A": "REJECTED", "B": "RIGHT"}),
        ("\u2717 A \u2713 B", {"A": "REJECTED", "B": "RIGHT"}),
        ("Between A and B I choose B", {"AB": "NAMED", "B": "CHOSEN"}),
    ],
)
def test_options_named_together_are_meant_alike(text, meant):
    groups = [("".join(group.labels), group.stance) for group in groups_of(text)]
    assert groups == [(labels, Stance[stance]) for labels, stance in meant.items()]


@pytest.mark.parametrize(
    ("text", "stands_out"),
    [
        ("B because the dog eats", [True]),
        ("B shows a dog", [False]),
        ("Dogs, so. B.", [True]),
        ("A shows B", [False, False]),
    ],
)
def test_an_option_stands_out_where_it_opens_the_text_or_is_its_last_sentence(text, stands_out):
    assert [group.stands_out for group in groups_of(text)] == stands_out
