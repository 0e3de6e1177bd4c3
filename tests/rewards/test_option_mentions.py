"""Where a text names options."""

import pytest

from longrl.rewards.option_mentions import letter_mentions, read_tokens, wording_mentions

SCENE = {"A": "A man is walking", "B": "Cats and dogs", "C": "A red car", "D": "car"}
VITAMINS = {"A": "Vitamin A", "B": "Vitamin C", "C": "Vitamin B", "D": "Vitamin D"}


def letters(text, options=SCENE):
    wordings = wording_mentions(text, read_tokens(text), options)
    return "".join(mention.label for mention in letter_mentions(text, options, wordings))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B and (C), but not D.", "BCD"),
        ("\u9009B\uff0c\u4e0d\u9009A", "BA"),  # Chinese has no spaces
        ("B\u00e4r, caf\u00e9 D\u00e9j\u00e0, AB, B2, D.C., B-roll, B's", "B"),
        ("player B, vitamin C, Plan A, C major and John D. Rockefeller", ""),
        ("players A and B", ""),
        ("In the video B is shown", "B"),
        ("A man, a dog, A family walks, A can of soda, A sports car, A friendly dog, A 10-year-old boy", ""),
        ("I see A. I say A, A fits, A clearly wins, A because he cooks, A it is, A 100%", "AAAAAAA"),
        ("I find A convincing", "A"),
        ("A est juste. A es correcta. A passt. A mulher.", "AAA"),
        ("the answer is b, as c and a are wrong", "bc".upper()),
        ("d'accord, c'est B", "B"),
        ("E is none of four, but an answer", "E"),
    ],
)
def test_letters_are_told_from_articles_and_names(text, found):
    assert letters(text) == found


def test_pronouns_are_no_option_i():
    nine = dict.fromkeys("ABCDEFGHI", "")
    assert letters("I think I is right, I am sure", nine) == "I"


def test_names_are_those_of_the_options_too():
    options = {"A": "Robo B wins", "B": "Robo A wins"}
    assert letters("robo A starts, so A", options) == "A"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is vitamin C, not Vitamin B", ["B", "C"]),
        ("vitamin A helps", ["A"]),
        ("vitamin E", []),
    ],
)
def test_wordings_hold_letters(text, found):
    assert [mention.label for mention in wording_mentions(text, read_tokens(text), VITAMINS)] == found
    assert letters(text, VITAMINS) == ""


@pytest.mark.parametrize(
    ("text", "label", "span"),
    [
        ("a red car stops", "C", "a red car"),
        ("one car stops", "D", "car"),
        ("CATS, and dogs!", "B", "CATS, and dogs"),
        ("So a man is walking", "A", "a man is walking"),
    ],
)
def test_the_longest_wording_is_found_with_its_article(text, label, span):
    (mention,) = wording_mentions(text, read_tokens(text), SCENE)
    assert (mention.label, text[mention.start : mention.end]) == (label, span)


def test_a_letter_and_its_own_wording_are_one_mention():
    for text in ("B. Cats and dogs", "Cats and dogs (B"):
        (mention,) = letter_mentions(text, SCENE, wording_mentions(text, read_tokens(text), SCENE))
        assert (mention.start, mention.end) == (0, len(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat, an owl!", ["cat", "owl"]),
        ("three men", ["3", "men"]),
        ("3.5 or 3/4 or -3 or 30%", ["3.5", "or", "3/4", "or", "-3", "or", "30%"]),
        ("0:15 - 0:30, 0:15 to 0:30", ["0:15", "0:30", "0:15", "0:30"]),
        ("none of these", ["none", "of", "above"]),
        ("\u5973\u4eba\u5582\u72d7", ["\u5973", "\u4eba", "\u5582", "\u72d7"]),
        ("x^2 < y", ["x", "^", "2", "<", "y"]),
    ],
)
def test_words_are_the_same_for_all_ways_to_write_them(text, words):
    assert [token.text for token in read_tokens(text)] == words


def test_yes_and_no_are_meant_at_the_start_or_end_of_a_sentence():
    options = {"A": "Yes", "B": "No"}
    text = "No. There is no dog"
    assert len(wording_mentions(text, read_tokens(text), options)) == 1
