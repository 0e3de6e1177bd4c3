"""How a text means the options it names."""

import re

import pytest
import yaml

import longrl.rewards.option_stance as option_stance
from longrl.rewards.option_stance import CUT, Stance, stance_before, turn_between, verdict_behind, words

CHOSEN, RIGHT, NAMED, CONCEDED, REJECTED = Stance


@pytest.mark.parametrize(
    ("before", "stance"),
    [
        ("", NAMED),
        ("The answer is ", CHOSEN),
        ("Answer:\n", CHOSEN),
        ("the best answer to this question is option (", CHOSEN),
        ("I would go with ", CHOSEN),
        ("it must be ", CHOSEN),
        ("The answer is not ", REJECTED),
        ("I don't think the answer is ", REJECTED),
        ("The wrong answer is ", REJECTED),
        ("neither ", REJECTED),
        ("rather than ", REJECTED),
        ("The man is not shown, so ", NAMED),
        ("Although ", CONCEDED),
        ("At first I thought ", CONCEDED),
        ("anything but ", REJECTED),
        ("nothing but ", RIGHT),
        ("\u2713 ", RIGHT),
        ("\u2717 ", REJECTED),
        ("La respuesta es ", CHOSEN),
        ("La respuesta no es ", REJECTED),
        ("C'est ", CHOSEN),
        ("nicht ", REJECTED),
        ("\u7b54\u6848\u662f", CHOSEN),  # Chinese: the answer is
        ("\u7b54\u6848\u4e0d\u662f", REJECTED),  # Chinese: the answer is not
    ],
)
def test_what_leads_up_to_an_option_says_how_it_is_meant(before, stance):
    assert stance_before(before) is stance


@pytest.mark.parametrize(
    ("after", "stance"),
    [
        ("", NAMED),
        (" shows a dog", NAMED),
        (" is right.", RIGHT),
        (" is clearly the best answer", RIGHT),
        (" fits.", RIGHT),
        (": yes", RIGHT),
        (" is not right", REJECTED),
        (" isn't it", REJECTED),
        (" and ", NAMED),
        (": no, ", REJECTED),
        (" is less likely than " + CUT, REJECTED),
        (", not " + CUT, NAMED),
        (" not " + CUT, NAMED),
        (". No other option fits", NAMED),
        (" no doubt", NAMED),
        (" is not wrong", RIGHT),
        (" is tempting", CONCEDED),
        ("? ", CONCEDED),
        (" est faux", REJECTED),
        (" ist richtig", RIGHT),
        ("\u662f\u6b63\u786e\u7684", RIGHT),  # Chinese: is right
        ("\u3067\u306f\u306a\u304f", REJECTED),  # Japanese: not
    ],
)
def test_what_follows_an_option_is_a_verdict_on_it(after, stance):
    verdict = verdict_behind(after)
    assert verdict.stance is stance
    assert (verdict.length > 0) == (stance is not NAMED)


@pytest.mark.parametrize(
    ("gap", "turn"),
    [
        (" or ", "or"),
        (" but also ", "or"),
        (", but ", "but"),
        (". No wait, ", "correction"),
        (" is wrong, so ", "so"),
        (" shows what ", None),
        (": ", "or"),
        ("\uff0c\u4f46", "but"),  # Chinese: but
    ],
)
def test_the_last_turning_word_between_two_options_counts(gap, turn):
    assert turn_between(gap) == turn


@pytest.mark.parametrize(
    "kind", yaml.safe_load((option_stance.files("longrl.rewards") / "option_words.yaml").read_text())
)
def test_every_kind_of_words_is_a_pattern_of_whole_words(kind):
    pattern = re.compile(words(kind))
    assert not pattern.fullmatch("")
    assert not pattern.search("xqz")
