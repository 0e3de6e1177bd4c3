"""Multiple choice: the options of a question, the option a text settles on, and whether it is the right one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from longrl.rewards.answer_text import lenient_text, strict_text

if TYPE_CHECKING:
    from longrl.types import Completion, Row

DEFAULT_LETTERS = "ABCDEFGH"


def multiple_choice(completion: Completion, row: Row) -> float:
    """1.0 when the content of `<answer>` settles on the option `row.answer`, else 0.0."""
    letter = chosen_option(strict_text(completion.text), parse_options(row.problem))
    return float(letter == row.answer.strip().upper())


def multiple_choice_lenient(completion: Completion, row: Row) -> float:
    """As `multiple_choice`; without an `<answer>` the text after the thinking is read instead."""
    letter = chosen_option(lenient_text(completion.text), parse_options(row.problem))
    return float(letter == row.answer.strip().upper())


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option a text settles on, by its letter or by its wording; None when unclear.

    Args:
        text: content of an `<answer>` tag, or a whole final statement.
        options: letter -> wording, as `parse_options` returns; when empty, any of A-H counts.
    """
    letters = "".join(options) or DEFAULT_LETTERS
    return (
        lone_letter(text, letters)
        or _same_wording(text, options)
        or extract_letter(text, letters)
        or _contained_wording(text, options)
    )


# ---- the options of a question ----

_MARKERS = (
    re.compile(r"^[ \t>*-]*\(?([A-Z])\s?[).:][ \t*]*", re.MULTILINE | re.IGNORECASE),  # "A. text" on its own line
    re.compile(r"(?<![\w(])\(([A-Z])\)[ \t]*"),  # (A) text (B) text
    re.compile(r"(?<!\S)([A-Z])[).:]\s+"),  # A. text B. text
)


def parse_options(problem: str) -> dict[str, str]:
    r"""Options of a question by letter: "Which?\nA. cat\nB. dog" gives `{"A": "cat", "B": "dog"}`.

    Reads "A. x", "A) x", "(A) x" and "A: x", one per line or in one line; letters must run from A without a gap.

    Returns:
        {} when the text holds no two such options.
    """
    text = unicodedata.normalize("NFKC", problem)
    for marker in _MARKERS:
        run = _longest_run(marker.finditer(text))
        if len(run) >= 2:
            stops = [match.start() for match in run[1:]] + [len(text)]
            bodies = [text[match.end() : stop] for match, stop in zip(run, stops, strict=True)]
            bodies[-1] = bodies[-1].lstrip().partition("\n")[0]  # what follows the last option is an instruction
            wordings = [" ".join(body.split()).strip(" ,;*") for body in bodies]
            return {match[1].upper(): wording for match, wording in zip(run, wordings, strict=True)}
    return {}


def _longest_run(matches: Iterable[re.Match[str]]) -> list[re.Match[str]]:
    """Longest run of markers A, B, C, ...; the later of equals, since options follow the question."""
    best: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for match in matches:
        letter = match[1].upper()
        if letter == chr(ord("A") + len(run)):
            run.append(match)
        elif letter == "A":
            run = [match]
        if len(run) >= len(best):
            best = run
    return best


# ---- an answer that repeats an option's wording ----


def _words(text: str) -> str:
    """Lower-case words without punctuation and articles, single-spaced."""
    words = re.findall(r"\w+", plain_text(text).lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _same_wording(text: str, options: Mapping[str, str]) -> str | None:
    said = {_words(text), _words(without_lead_in(text))} - {""}
    same = [letter for letter, wording in options.items() if _words(wording) in said]
    return same[0] if len(same) == 1 else None


def _contained_wording(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose wording occurs in the text; "a red car" beats "car" where both do."""
    said = f" {_words(text)} "
    inside = {letter: f" {_words(wording)} " for letter, wording in options.items() if _words(wording)}
    inside = {letter: wording for letter, wording in inside.items() if wording in said}
    longest = [a for a, wording in inside.items() if not any(wording in b and wording != b for b in inside.values())]
    return longest[0] if len(longest) == 1 else None


# ---- the option letter a text settles on ----
# A text can name several letters ("option C because A and B are wrong"). Rules are tried from the surest to the
# vaguest; the first that finds any letter decides, and a rule that finds two letters decides for none: hedging ("A or
# B") must not pay.


def extract_letter(text: str, letters: Iterable[str] = DEFAULT_LETTERS) -> str | None:
    """The option letter a text settles on; None when it names none, or several without a decision.

    Example:
        "The answer is B. Cats and Dogs" -> B; "option C because A and B are wrong" -> C;
        "A man is walking. So the answer is C" -> C; "A or B" -> None.
    """
    if letter := lone_letter(text, letters):
        return letter
    plain = plain_text(text)
    for rule in _RULES:
        found = rule(plain, "".join(letters))
        if found:
            return found[0] if len(set(found)) == 1 else None
    return None


def lone_letter(text: str, letters: Iterable[str] = DEFAULT_LETTERS) -> str | None:
    """The letter of a text that is a letter and nothing else: "B", "(b)", "Option B."."""
    pattern = rf"\W*(?:(?:option|choice|answer|letter)\W+)?([{''.join(letters)}])\W*"
    match = re.fullmatch(pattern, plain_text(text), re.IGNORECASE)
    return match[1].upper() if match else None


def without_lead_in(text: str) -> str:
    """The text without an opening "The answer is"."""
    return re.sub(rf"^\W*(?:{_HEAD}){_FILLER}", "", re.sub(r"^the ", "", plain_text(text), flags=re.I), flags=re.I)


def plain_text(text: str) -> str:
    """One line without Markdown, LaTeX wrappers, tags and quotation marks."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    text = re.sub(r"</?\w+>", " ", text)
    for _ in range(2):  # \boxed{\text{B}}
        text = re.sub(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[*`$_\"\u201c\u201d]", "", text)
    text = re.sub(r"(?<!\w)'([A-Za-z])'(?!\w)", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


# ---- the vocabulary of the rules ----

# Words after "A" that show it is the letter; before any other lower-case word it is the article ("A man is walking").
_AFTER_LETTER = (
    "because since as is was isn't and or but nor not for with based given due where while which that so would could "
    "should must can cannot best matches fits describes seems looks in if than "
    "porque pois parce puisque weil denn perch\u00e9"  # "because" in Spanish, Portuguese, French, German and Italian
)
_BEST = r"(?:correct|right|best|final|most (?:likely|plausible|accurate|appropriate|suitable))"
_HEAD = (
    rf"(?<![\w-])(?<!wrong )(?<!incorrect )(?<!not the )"
    rf"(?:(?:{_BEST} ){{0,3}}(?:answer|solution)(?: option| choice| letter)?"
    rf"|{_BEST} (?:option|choice|letter|one|match|description)"
    r"|(?:I|I'd|I would|I'll) say"
    r"|choose|chose|pick|picked|select|selected|go with|going with|went with|opt for|settle on)"
    r"(?: (?:to|for) (?:the|this) \w+)?"
)
_FILLER = (
    r"(?:\s*(?:(?:is|are|was|be|would|should|must|will|could|likely|probably|therefore|thus|hence|definitely|clearly|"
    r"indeed|most|seems|appears|to|has)(?![\w'])|:|=|-+>?|\u2192|,))*\s*(?:(?:option|choice|letter|answer)\b\s*:?\s*)?"
)
_IS_RIGHT = (
    r"(?: (?:is|must be|would be|seems|looks)(?: \w+ly| thus)? "
    r"(?:correct\b|right\b|the answer\b"
    rf"|(?:the )?(?:{_BEST} ){{1,3}}(?:answer|option|choice|one|match|fit|description)\b)"
    r"| (?:fits|matches|suits) (?:\w+ ){0,3}best\b| best (?:fits|matches|describes|captures)\b"
    r"| ?[:=] ?(?:yes|correct)(?=[.,;!]|$))"  # "A: no. B: yes."
)
_IS_WRONG = re.compile(
    r"[)\]]?(?:\s+(?:is|are|was|were|can|could|do|does|did|seems?|looks?|has|have|would|both|also|clearly|all|be|to)"
    r"(?=n't\b|\W))*(?:n't\b|\s+(?:not|wrong|incorrect|false|ruled out|eliminated|excluded|impossible|unlikely|cannot|"
    r"contradicts?|out|can't)\b)"
    r"|\s*\u9009?\u9879?(?:\u4e0d\u5bf9|\u4e0d\u6b63\u786e|\u4e0d\u662f|\u9519\u8bef|\u662f\u9519)",  # Chinese
    re.IGNORECASE,
)
_REJECTING = re.compile(
    r"(?:\bnot|n't|\bnor|\bneither|\bnever|\bunlike|\bthan|\b(?:rul|eliminat|exclud|reject|discard)(?:e|es|ed|ing)?"
    r"(?: out)?|\binstead of|\bwrong (?:answer|option|choice) is|\bnicht|\bkeine?|\bpas|\bnon|\bno es"
    r"|\u4e0d\u662f|\u4e0d\u9009|\u5e76\u975e)(?: options?| choices?| answers?| letters?)? *[(\[]?$",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(
    r"\b(?:no(?=,)|so|thus|therefore|hence|finally|conclude|conclusion|leaves|leaving|left with|must be|namely)\b"
    r"[^.!?]{0,25}$",
    re.IGNORECASE,
)
_REACH = 100
"""Characters before and after a letter that can tell how it is meant."""
_ITEM = r"(?:options? )?[(\[]?[A-Z][)\]]?"
_LIST_BEFORE = re.compile(rf"(?:\b{_ITEM}(?:,| and| or|/)+ ?)+(?:options? )?[(\[]?$")
_LIST_AFTER = re.compile(rf"^[)\]]?(?:(?:,| and| or|/|,? nor)+ ?{_ITEM}(?!\w))*")


# ---- finding letters that are meant ----


def _letter(letters: str) -> str:
    # ASCII neighbours only: no space parts a Chinese sentence from its letter.
    return rf"(?<![A-Za-z0-9_'])[(\[]?(?P<letter>[{letters}])(?!['-]?[A-Za-z0-9_])[)\]]?"


def _find(pattern: str, plain: str, *, flags: int = re.IGNORECASE, lists: bool = True) -> list[re.Match[str]]:
    """Matches whose letter is meant as a letter and is not being rejected."""
    matches = re.finditer(pattern, plain, flags)
    return [match for match in matches if not _is_article(match) and not _is_rejected(match, lists=lists)]


def _around(match: re.Match[str]) -> tuple[str, str]:
    """What stands right before and after the letter; a rule that looked further would take quadratic time."""
    start, end = match.span("letter")
    return match.string[max(0, start - _REACH) : start], match.string[end : end + _REACH]


def _is_article(match: re.Match[str]) -> bool:
    """Whether "a" or "i" is the word, not the letter."""
    if match["letter"] not in "AaIi":
        return False
    following = re.match(r" ([a-z][\w'-]*)", _around(match)[1])
    return following is not None and following[1] not in _AFTER_LETTER.split()


def _is_rejected(match: re.Match[str], *, lists: bool) -> bool:
    """Whether the letter is called wrong; with `lists` also as one of "A, B and C are wrong"."""
    before, after = _around(match)
    if lists:
        before, after = _LIST_BEFORE.sub("", before), _LIST_AFTER.sub("", after)
    return _IS_WRONG.match(after) is not None or _REJECTING.search(before) is not None


def _hedges(match: re.Match[str], letters: str) -> list[str]:
    """Further letters offered together with the matched one: "B or C", "A, B and D."."""
    offered = re.match(
        r"[)\]]?((?:\s*(?:,|/|&|\band\b|\bor\b)+\s*(?:rather |maybe |perhaps |possibly |else )?"
        rf"(?:options? )?[(\[]?[{letters}][)\]]?(?!['-]?\w))+)\s*(.?)",
        _around(match)[1],
        re.IGNORECASE,
    )
    if offered is None or not (offered[2] in ("", ".", ",", ";", "!") or re.search(r"\bor\b|/", offered[1])):
        return []
    return re.findall(rf"\b[{letters}]\b", offered[1].upper())


# ---- the rules, surest first: the letters found, the decided one first ----


def _only_letters(plain: str, letters: str) -> list[str]:
    """Nothing but letters: a list of them decides for none, one and the same repeated for it."""
    return re.findall(rf"[{letters}]", plain) if re.fullmatch(rf"(?:\W*\b[{letters}]\b)+\W*", plain) else []


def _declared(plain: str, letters: str) -> list[str]:
    """The last "the answer is B", "I choose B" or "B is correct"."""
    found = _find(_HEAD + _FILLER + _letter(letters), plain, lists=False)
    found += _find(_letter(letters) + _IS_RIGHT, plain, lists=False)
    if not found:
        return []
    last = max(found, key=lambda match: match.start("letter"))
    return [last["letter"].upper(), *_hedges(last, letters)]


def _leading(plain: str, letters: str) -> list[str]:
    """A letter that opens the text: "B. Cats", "(B) Cats", "b) Cats", "B because ..."."""
    start = re.search(r"[\w(\[]", plain)
    if start is None or re.match(r"\W*A\W.*\bB[).:].*\bC[).:]", plain):  # all options repeated
        return []
    opened = plain[start.start() :]
    found = _find(rf"\A{_letter(letters)}(?!\.\w\.)", opened)
    if not found:
        return []
    also = _find(rf"(?<=[,;] )(?:or |and )?\(?(?P<letter>[{letters}])[).:](?= )", opened, flags=0)  # "A. x, D. y"
    return [found[0]["letter"].upper(), *_hedges(found[0], letters), *(match["letter"] for match in also)]


def _mentioned(plain: str, letters: str) -> list[str]:
    """A letter pointed at anywhere: "option B", "(B)", "it's B"."""
    naming = r"(?:\b(?:option|choice|letter) |\bit(?:'s| is) |(?=[(\[]))"
    return _decided(_find(naming + _letter(letters), plain), letters)


def _standing(plain: str, letters: str) -> list[str]:
    """A capital letter standing by itself anywhere."""
    return _decided(_find(_letter(letters), plain, flags=0), letters)


def _decided(found: list[re.Match[str]], letters: str) -> list[str]:
    """The last letter where a conclusion leads up to it, else all of them."""
    if found and _CONCLUDING.search(_around(found[-1])[0]):
        return [found[-1]["letter"].upper(), *_hedges(found[-1], letters)]
    return [match["letter"].upper() for match in found]


Rule = Callable[[str, str], list[str]]
_RULES: tuple[Rule, ...] = (_only_letters, _declared, _leading, _mentioned, _standing)
