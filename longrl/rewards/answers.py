"""What a completion answers: its form, the text of its answer, and the option which that text settles on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

from longrl.types import Completion, Row

DEFAULT_LETTERS = "ABCDEFGH"


def multiple_choice(completion: Completion, row: Row) -> float:
    """1.0 when the content of `<answer>` settles on the option `row.answer`, else 0.0."""
    letter = chosen_option(answer_text(completion.text) or "", parse_options(row.problem))
    return float(letter == row.answer.strip().upper())


def multiple_choice_lenient(completion: Completion, row: Row) -> float:
    """As `multiple_choice`; without an `<answer>` the text after the thinking is read instead."""
    letter = chosen_option(lenient_text(completion.text), parse_options(row.problem))
    return float(letter == row.answer.strip().upper())


# ---- the form of a completion, and where its answer stands ----

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_OPEN_ANSWER = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_CLOSE_ANSWER = re.compile(r"<\s*/\s*answer\s*>", re.IGNORECASE)
_OPEN_THINK = re.compile(r"<\s*think\s*>", re.IGNORECASE)
_CLOSE_THINK = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)


def think_answer_format(completion: Completion, row: Row) -> float:
    r"""1.0 when the text is one `<think>..</think>`, then one `<answer>..</answer>`, both with content, else 0.0.

    Example:
        `<think>He pours tea.</think>\n<answer>B</answer>` has the form; a word before, between or after the two
        blocks, a repeated tag or a blank block breaks it.
    """
    text = completion.text
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    match = _THINK_ANSWER.fullmatch(text)
    return float(match is not None and all(part.strip() for part in match.groups()))


def after_thinking(text: str) -> str:
    """What follows the last `</think>`: the text itself when it has no think tag, "" when the thinking never ended."""
    closing = list(_CLOSE_THINK.finditer(text))
    if closing:
        return text[closing[-1].end() :]
    opening = _OPEN_THINK.search(text)
    return text[: opening.start()] if opening else text


def answer_text(text: str) -> str | None:
    """Content of the last closed `<answer>..</answer>`, stripped; None when there is none.

    An answer inside finished thinking does not count. When the thinking was never closed the whole text is searched,
    for a model that forgot `</think>` has still answered.
    """
    thinking_end = max((match.end() for match in _CLOSE_THINK.finditer(text)), default=0)
    scope = text[thinking_end:]
    closing = list(_CLOSE_ANSWER.finditer(scope))
    if not closing:
        return None
    before = scope[: closing[-1].start()]
    opening = list(_OPEN_ANSWER.finditer(before))
    if not opening:
        return None
    content = _CLOSE_ANSWER.sub(" ", before[opening[-1].end() :]).strip()
    return content or None


def strict_text(text: str) -> str:
    """What a strict score reads: the `<answer>` content, "" without one."""
    return answer_text(text) or ""


def lenient_text(text: str) -> str:
    """What a lenient score reads: the `<answer>` content, else all that follows the thinking."""
    return answer_text(text) or after_thinking(text).strip()


# ---- the options of a question ----

_MARKERS = (
    re.compile(r"^[ \t>*-]*\(?([A-Z])\s?[).:][ \t*]*", re.MULTILINE | re.IGNORECASE),  # "A. text" on its own line
    re.compile(r"(?<![\w(])\(([A-Z])\)[ \t]*"),  # (A) text (B) text
    re.compile(r"(?<!\S)([A-Z])[).:]\s+"),  # A. text B. text
)


def with_options(question: str, options: Iterable[str]) -> str:
    """A question with a line for each of its options, as a model reads it."""
    lines = (f"{letter}. {option}" for letter, option in zip(DEFAULT_LETTERS, options, strict=False))
    return "\n".join([question, *lines])


def parse_options(problem: str) -> dict[str, str]:
    r"""Options of a question by letter: "Which?\nA. cat\nB. dog" gives `{"A": "cat", "B": "dog"}`.

    Reads "A. x", "A) x", "(A) x" and "A: x", one per line or in one line; letters must run from A without a gap.

    Returns:
        {} when the text holds no two such options.
    """
    text = unicodedata.normalize("NFKC", problem)
    for marker in _MARKERS:
        # 1. The longest run of markers A, B, C, ...; the later of equals, since options follow the question.
        best: list[re.Match[str]] = []
        run: list[re.Match[str]] = []
        for match in marker.finditer(text):
            letter = match[1].upper()
            if letter == chr(ord("A") + len(run)):
                run.append(match)
            elif letter == "A":
                run = [match]
            if len(run) >= len(best):
                best = run
        # 2. The wording of an option reaches to the next marker.
        if len(best) >= 2:
            stops = [match.start() for match in best[1:]] + [len(text)]
            bodies = [text[match.end() : stop] for match, stop in zip(best, stops, strict=True)]
            bodies[-1] = bodies[-1].lstrip().partition("\n")[0]  # what follows the last option is an instruction
            wordings = [" ".join(body.split()).strip(" ,;*") for body in bodies]
            return {match[1].upper(): wording for match, wording in zip(best, wordings, strict=True)}
    return {}


# ---- the option a text settles on ----


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option a text settles on, by its letter or by its wording; None when unclear.

    Args:
        text: content of an `<answer>` tag, or a whole final statement.
        options: letter -> wording, as `parse_options` returns; when empty, any of A-H counts.

    Example:
        "The answer is B. Cats and Dogs" -> B; "option C because A and B are wrong" -> C;
        "A man is walking. So the answer is C" -> C; "A or B" -> None.
    """
    letters = "".join(options) or DEFAULT_LETTERS
    plain = plain_text(text)
    # 1. A letter and nothing else: "B", "(b)", "Option B.".
    alone = re.fullmatch(rf"\W*(?:(?:option|choice|answer|letter)\W+)?([{letters}])\W*", plain, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    # 2. The wording of one option, alone or after "The answer is"; compared in words without punctuation and articles.
    without_lead_in = _LEAD_IN.sub("", re.sub(r"^the ", "", plain, flags=re.IGNORECASE))
    normalized = []
    for sentence in (text, without_lead_in, *options.values()):
        words = re.findall(r"\w+", plain_text(sentence).lower())
        normalized.append(" ".join(word for word in words if word not in ("a", "an", "the")))
    said, concluded, *worded = normalized
    wordings = {letter: wording for letter, wording in zip(options, worded, strict=True) if wording}
    same = [letter for letter, wording in wordings.items() if wording in (said, concluded)]
    if len(same) == 1:
        return same[0]
    # 3. A letter that is stated.
    stated = _stated_letters(plain, letters)
    if len(set(stated)) == 1:
        return stated[0]
    # 4. The one option whose wording occurs in the text; "a red car" beats "car" where both do.
    inside = {letter: f" {wording} " for letter, wording in wordings.items() if f" {wording} " in f" {said} "}
    longest = [a for a, wording in inside.items() if not any(wording in b and wording != b for b in inside.values())]
    return longest[0] if len(longest) == 1 else None


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
_LEAD_IN = re.compile(rf"^\W*(?:{_HEAD}){_FILLER}", re.IGNORECASE)
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


# ---- letters that are stated ----
# A text can name several letters ("option C because A and B are wrong"). Rules are tried from the surest to the
# vaguest; the first that finds any letter decides, and a rule that finds two letters decides for none: hedging ("A or
# B") must not pay.


def _stated_letters(plain: str, letters: str) -> list[str]:
    """The letters by the surest rule that finds any, the decided one first."""
    # ASCII neighbours only: no space parts a Chinese sentence from its letter.
    letter = rf"(?<![A-Za-z0-9_'])[(\[]?(?P<letter>[{letters}])(?!['-]?[A-Za-z0-9_])[)\]]?"

    # 1. Nothing but letters: a list of them decides for none, one and the same repeated for it.
    if re.fullmatch(rf"(?:\W*\b[{letters}]\b)+\W*", plain):
        return re.findall(rf"[{letters}]", plain)

    # 2. The last "the answer is B", "I choose B" or "B is correct".
    declared = _meant_matches(_HEAD + _FILLER + letter, plain, lists=False)
    declared += _meant_matches(letter + _IS_RIGHT, plain, lists=False)
    if declared:
        last = max(declared, key=lambda match: match.start("letter"))
        return [last["letter"].upper(), *_hedges(last, letters)]

    # 3. A letter that opens the text, "B. Cats" or "B because ...", unless the text repeats all options.
    start = re.search(r"[\w(\[]", plain)
    if start and not re.match(r"\W*A\W.*\bB[).:].*\bC[).:]", plain):
        opened = plain[start.start() :]
        leading = _meant_matches(rf"\A{letter}(?!\.\w\.)", opened)
        if leading:
            more = rf"(?<=[,;] )(?:or |and )?\(?(?P<letter>[{letters}])[).:](?= )"  # "A. x, D. y"
            also = [match["letter"] for match in _meant_matches(more, opened, flags=0)]
            return [leading[0]["letter"].upper(), *_hedges(leading[0], letters), *also]

    # 4. A letter pointed at anywhere ("option B", "(B)", "it's B"), or a capital letter that stands by itself: the last
    #    one where a conclusion leads up to it, else all of them.
    naming = r"(?:\b(?:option|choice|letter) |\bit(?:'s| is) |(?=[(\[]))"
    mentioned = _meant_matches(naming + letter, plain) or _meant_matches(letter, plain, flags=0)
    if mentioned and _CONCLUDING.search(_around(mentioned[-1])[0]):
        return [mentioned[-1]["letter"].upper(), *_hedges(mentioned[-1], letters)]
    return [match["letter"].upper() for match in mentioned]


def _meant_matches(pattern: str, plain: str, *, flags: int = re.IGNORECASE, lists: bool = True) -> list[re.Match[str]]:
    """Matches whose letter is meant as a letter and is not called wrong; with `lists` not in a list of wrong ones."""
    meant = []
    for match in re.finditer(pattern, plain, flags):
        before, after = _around(match)
        following = re.match(r" ([a-z][\w'-]*)", after)
        if match["letter"] in "AaIi" and following and following[1] not in _AFTER_LETTER.split():
            continue  # the word "a" or "I"
        if lists:  # "A, B and C are wrong"
            before = _LIST_BEFORE.sub("", before)
            after = _LIST_AFTER.sub("", after)
        if not _IS_WRONG.match(after) and not _REJECTING.search(before):
            meant.append(match)
    return meant


def _around(match: re.Match[str]) -> tuple[str, str]:
    """What stands right before and after the letter; a rule that looked further would take quadratic time."""
    start, end = match.span("letter")
    return match.string[max(0, start - _REACH) : start], match.string[end : end + _REACH]


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
