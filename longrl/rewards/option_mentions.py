"""Where a text names options: by a letter, told from articles and from names that hold one, or by a wording."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from longrl.rewards.option_stance import REACH, verdict_behind, words
from longrl.rewards.options import DEFAULT_LETTERS
from longrl.rewards.plain_text import plain_text

FIRST_MENTIONS, LAST_MENTIONS = 12, 28
"""Of more mentions these at the two ends of a text are read: work stays linear, and no answer has as many."""


@dataclass(frozen=True)
class Mention:
    """A place where a text names an option."""

    label: str
    start: int
    end: int
    """Behind the letter, or behind the option's own wording that follows it: "B. Cats and dogs"."""
    is_listed: bool = False
    """Stands as in a list of options: "B.", "B)", "(B)" or "B:" at the start of a sentence."""


# ---- words ----

_TOKEN = re.compile(
    r"(?<=\d) (?:to|-) (?=\d)|"  # 3 to 5, 3 - 5: as 3 5
    r"(?P<number>(?<![\w.)])-?\d+(?:[.,:/]\d+)*%?(?!\w))|(?P<sign>[+^<>=])|"
    r"(?P<word>[\u2e80-\U0010ffff]|[^\W\u2e80-\U0010ffff]+)"  # every Chinese sign is a word
)
_WORD_BEHIND = re.compile(r" ?\w\w")
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "zero": "0", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15",
    "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
}  # fmt: skip
"""But for "one", which is a pronoun too."""
_SAME_WORDS = {**_NUMBERS, "yeah": "yes", "yep": "yes", "yup": "yes", "nope": "no", "nah": "no"}
_ARTICLE_FIRST = re.compile(r"\W*(?:an?|the)\b", re.IGNORECASE)
_ARTICLE_LAST = re.compile(r"(?<!\w)(?:an?|the) $", re.IGNORECASE)
_OF_THE_ABOVE = ("these", "them", "those", "options", "choices")
_NO_DOUBT = re.compile(r" (?:doub|ques|prob|idea)")
_NAME = re.compile(words("named_by_letter"), re.IGNORECASE)


class Token(NamedTuple):
    """A word or number of a text, the same for all ways to write it."""

    text: str
    start: int
    end: int


def read_tokens(plain: str) -> list[Token]:
    """The words of a text without articles: "three" is 3, and "none of these" is "none of above"."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(plain):
        text = match[0].lower()
        if match.lastgroup is None:
            continue
        if text in _ARTICLES and _WORD_BEHIND.match(plain, match.end()) and not _follows_name(tokens):
            continue
        if text in _OF_THE_ABOVE and tokens and tokens[-1].text == "of":
            text = "above"
        tokens.append(Token(_SAME_WORDS.get(text, text), *match.span()))
    return tokens


def _follows_name(tokens: Sequence[Token]) -> bool:
    """Whether an "a" is the letter of a name: "vitamin A helps"."""
    return bool(tokens) and _NAME.fullmatch(tokens[-1].text) is not None


def wording_tokens(options: Mapping[str, str]) -> dict[str, list[str]]:
    """The words of each option that has a wording."""
    tokens = {label: [token.text for token in read_tokens(plain_text(options[label]))] for label in options}
    return {label: texts for label, texts in tokens.items() if texts}


# ---- wordings ----


def wording_mentions(plain: str, tokens: Sequence[Token], options: Mapping[str, str]) -> list[Mention]:
    """Where the wordings of options stand; "a red car" is found before "car", which it holds.

    Args:
        plain: the text.
        tokens: its words, as `read_tokens` returns them.
        options: label -> wording.
    """
    sought = _wordings_by_first_word(options)
    mentions: list[Mention] = []
    index = 0
    while index < len(tokens):
        for wording, label in sought.get(tokens[index].text, ()):
            found = tokens[index : index + len(wording)]
            if [token.text for token in found] == wording and (len(found) > 1 or _is_meant(plain, found[0])):
                start = _start_with_article(plain, found[0].start, options[label])
                mentions.append(Mention(label, start, found[-1].end))
                index += len(wording) - 1
                break
        index += 1
    return mentions[:FIRST_MENTIONS] + mentions[FIRST_MENTIONS:][-LAST_MENTIONS:]


def _wordings_by_first_word(options: Mapping[str, str]) -> dict[str, list[tuple[list[str], str]]]:
    """Wordings and their labels, longer ones first, without those that two options have or that are labels."""
    tokens = wording_tokens(options)
    sought: dict[str, list[tuple[list[str], str]]] = {}
    for label, wording in sorted(tokens.items(), key=lambda item: -len(item[1])):
        is_label = len(wording) == 1 and wording[0].upper() in options  # of {"A": "B", "B": "A"}
        if not is_label and list(tokens.values()).count(wording) == 1:
            sought.setdefault(wording[0], []).append((wording, label))
    return sought


def _start_with_article(plain: str, start: int, wording: str) -> int:
    """Where a wording starts in a text, with its article: the "A" of "A bird lands" is no option A."""
    article = _ARTICLE_LAST.search(plain, max(0, start - 4), start)
    return article.start() if article and _ARTICLE_FIRST.match(wording) else start


def _is_meant(plain: str, token: Token) -> bool:
    """Whether a wording of one word stands for an option: neither the "no" of "there is no dog" nor the 3 of "3-4"."""
    before, behind = plain[max(0, token.start - 3) : token.start], plain[token.end : token.end + 5]
    if token.text in ("yes", "no"):
        if _NO_DOUBT.match(behind):
            return False
        opens = re.search(r"(?:^|[.,;:!?\n(\u2014-])\s*$", before)
        return bool(opens or re.match(r"\s*(?:[.,;:!?)\n]|(?:and|or)\b|$)", behind))
    return not (token.text[-1].isdigit() and (re.match(r"-\d", behind) or re.search(r"\d-$", before)))


# ---- letters ----

_BESIDE = r"[^\W\u0e00-\u0eff\u1780-\u17ff\u2e80-\U0010ffff]"
"""What no letter of an option stands beside: letters and digits, but of scripts that part words by spaces alone."""
_NAME_BEFORE = re.compile(rf"{words('named_by_letter')}[ -]?$", re.IGNORECASE)
_WITH_DETERMINER = re.compile(r"\b(?:the|this|that) \w+ $", re.IGNORECASE)
_NAME_BEHIND = re.compile(rf"[ -]?{words('named_behind')}", re.IGNORECASE)
_NAME_JOINT = re.compile(rf"[\s,/&]*{words('joint')}?[\s,/&]*", re.IGNORECASE)
_NOT_A_FIRST_NAME = re.compile(
    rf"\w|{words('naming', 'answer', 'so', 'it_is', 'link', 'adverb', 'after_letter')}", re.IGNORECASE
)
_LEADS_TO_LETTER = re.compile(rf"(?:{words('naming', 'answer')}[\w\s']{{0,20}}[\s:=(\[]*|[(\[]\s?)$", re.IGNORECASE)
_NO_NAME = re.compile(words("joint", "not_before", "naming", "answer", "it_is") + "|both|either", re.IGNORECASE)
_LISTED_BEFORE = re.compile(r"(?:^|[\n.,;:!?]\s?)(?:and |or )?[(\[]?$")
_LISTED_BEHIND = re.compile(r"\s?[).:\]]")
_BEFORE_OWN_WORDING = re.compile(r"\W*(?:(?:an?|the) )?", re.IGNORECASE)


def letter_mentions(plain: str, options: Mapping[str, str], wordings: Sequence[Mention]) -> list[Mention]:
    """Where letters of options, or up to H, stand as such, outside the wordings of options.

    Args:
        plain: the text.
        options: label -> wording.
        wordings: what `wording_mentions` found.
    """
    others = [letter for letter in DEFAULT_LETTERS if "A" in options]  # "E" of four options is an answer, a wrong one
    labels = dict.fromkeys([*options, *others], "")
    pattern = re.compile(
        rf"(?<!{_BESIDE})(?<![A-Za-z][.'-])(?<!\u00b0)(?<![nN]/)(?<!\d[.,:/])(?i:{label_pattern(labels)})"
        rf"(?!{_BESIDE}|'(?!s\b)\w|\.\w\.|[.,:/]\d|[+#](?!\w))"
    )
    covered = {index for wording in wordings for index in range(wording.start, wording.end)}
    matches = [match for match in pattern.finditer(plain) if match.start() not in covered]
    names = _words_before_letters(options)
    mentions: list[Mention] = []
    name_end = None
    for match in matches[:FIRST_MENTIONS] + matches[FIRST_MENTIONS:][-LAST_MENTIONS:]:
        start, end = match.span()
        before, behind = plain[max(0, start - REACH) : start], plain[end : end + REACH]
        listed_with_name = name_end is not None and _NAME_JOINT.fullmatch(plain, name_end, start)
        if listed_with_name or _is_name(match[0], before, behind, names):
            name_end = end
        elif _is_letter(match[0], before, behind):
            is_listed = bool(_LISTED_BEFORE.search(before) and _LISTED_BEHIND.match(behind))
            mention = Mention(match[0].upper(), start, end, is_listed)
            mentions.append(_with_own_wording(mention, plain, wordings))
    return mentions


def _with_own_wording(mention: Mention, plain: str, wordings: Sequence[Mention]) -> Mention:
    """A letter together with the wording of its option right beside it: "B. Cats and dogs", "cats and dogs (B)"."""
    for wording in wordings:
        if wording.label != mention.label:
            continue
        if wording.start >= mention.end and _BEFORE_OWN_WORDING.fullmatch(plain, mention.end, wording.start):
            return replace(mention, end=wording.end)
        if wording.end <= mention.start and not re.search(r"\w", plain[wording.end : mention.start]):
            return replace(mention, start=wording.start)
    return mention


def label_pattern(options: Mapping[str, str]) -> str:
    """A pattern for any label; AA before A."""
    return "|".join(sorted(options, key=len, reverse=True))


def _words_before_letters(options: Mapping[str, str]) -> frozenset[str]:
    """Words that stand before a letter in the options themselves, such as the "player" of "Player B wins"."""
    pattern = re.compile(rf"(\w+) (?:{label_pattern(options)})(?!\w)")
    found = {match[1].lower() for wording in options.values() for match in pattern.finditer(wording)}
    return frozenset(word for word in found if not _NO_NAME.fullmatch(word))


def _is_name(letter: str, before: str, behind: str, names: frozenset[str]) -> bool:
    """Whether a letter is part of a name: "player B", "C major", "John D. Rockefeller"."""
    if letter.isupper() and _NAME_BEHIND.match(behind):
        return True
    if _NAME_BEFORE.search(before):
        return not _WITH_DETERMINER.search(before)  # "in the video B is shown"
    word = re.search(r"([^\W\d_]+)[ -]$", before)
    if word is None:
        return False
    is_initial = word[1].istitle() and re.match(r"\. [A-Z][a-z]", behind) and not _NOT_A_FIRST_NAME.fullmatch(word[1])
    return word[1].lower() in names or bool(is_initial)


# ---- the letter A, or an article ----

_ADVERBS = rf"(?: (?!{words('no_adverb')}){words('adverb')})*"
_SENTENCE_ENDS = r"(?=\s*(?:[.,;:!?)\]\n\u2014\u2013|=/-]|$))"
_AFTER_A = re.compile(
    r"(?! ?[A-Za-z\u00c0-\u024f]| \d+[ -]?[a-z]|-[a-z])|"  # no word follows
    r" (?!on[ce]|eu)[aeio][a-z]+(?!\w)|"  # one that would want "an"
    rf"{_ADVERBS}(?:[ -]{words('after_letter')}(?!-)| (?!{words('no_verb')})[a-z]{{2,}}s(?![\w'-])|"
    rf" (?!\w*e[ea]d |bed|shed|sled|shred)[a-z]{{3,}}ed (?:the|it|this|that|best|all|by|on|in|at|as)\b|"
    rf" {words('ends_letter')}{_SENTENCE_ENDS}|{_SENTENCE_ENDS})",
    re.IGNORECASE,
)
_FUNCTION_WORD = re.compile(words("after_letter"), re.IGNORECASE)
_NUMBER_AS_LABEL = re.compile(rf"\s?[).:\]]|$| {words('because')}|[\s,/&]*{words('joint')}?[\s,/&]*\d", re.IGNORECASE)
_AFTER_I = re.compile(r"(?![ ,]*[a-z'])|,? (?:is|because|since|[a-z]{3,}s)\b")


def _is_letter(letter: str, before: str, behind: str) -> bool:
    """Whether a letter is one: no article, no pronoun, no other word; a number must be said to be an option."""
    if re.match(r"-[a-z]", behind) and not _FUNCTION_WORD.match(behind, 1):  # "B-roll"
        return False
    is_led_to = _LEADS_TO_LETTER.search(before) is not None
    if letter.isdigit():
        return is_led_to or _NUMBER_AS_LABEL.match(behind) is not None or verdict_behind(behind).length > 0
    if letter in "aeiouy" and not is_led_to and not re.match(r"\s?[).:,\n]|$| (?:is|because|since)\b", behind):
        return False
    if letter == "A" and (re.search(r"[a-z] $", before) or re.match(r" [A-Z](?!\w)", behind)):
        return True  # within a sentence an article is written small, and none stands before a letter
    if letter in ("A", "a"):
        return _AFTER_A.match(behind) is not None
    if letter in ("I", "i"):
        return _AFTER_I.match(behind) is not None
    return True
