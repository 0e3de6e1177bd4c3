"""The option that an answer settles on.

An answer can name several options ("C because A and B are wrong"), and one in many ways. What settles it is read in
this order, first behind the last "Answer:", then everywhere: a letter that is all of it, a wording that is all of it,
the letters it names, the wordings it names. Where it names several, each is taken as the text means it
(`option_stance.py`), from left to right: what is called the answer counts before what is only named, the later before
the earlier, and two that are offered together count for none, since hedging must not pay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from longrl.rewards.option_groups import Group, group_mentions
from longrl.rewards.option_mentions import (
    label_pattern,
    letter_mentions,
    read_tokens,
    wording_mentions,
    wording_tokens,
)
from longrl.rewards.option_stance import Stance, words
from longrl.rewards.options import DEFAULT_LETTERS
from longrl.rewards.plain_text import plain_text

_WRONG_MARK = re.compile(words("wrong_mark"))
_ALONE = re.compile(rf"\W*(?:{words('naming')}\W+)?(?P<label>[A-Z]{{1,2}}|\d{{1,2}})[^\w+#]*", re.IGNORECASE)
_LEAD_IN = re.compile(
    r"(?:(?:^|\n)[^\w\n]*(?:the |my )?(?:(?:final|correct|best|right) )*(?:answer|ans)(?: is)?|^Q:[^\n]*\bA)"
    r"\s*[:=.\n]\s*",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_POSITION = rf"(?P<ordinal>{'|'.join(_ORDINALS)}|last)"
_BY_POSITION = re.compile(rf"(?<!\bmy )\b(?:the )?{_POSITION} (?:option|alternative)(?!\w)", re.IGNORECASE)
_POSITION_ALONE = re.compile(rf"\W*(?:the )?{_POSITION}(?: one| choice)?\W*", re.IGNORECASE)
_LIST = r"[\s,;/&|+().'\[\]-]*"


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Label of the option a text settles on, by its letter or by its wording; None when unclear.

    Args:
        text: content of an `<answer>` tag, or a whole final statement; of a long one both ends are read, see
            `plain_text`.
        options: label -> wording, as `parse_options` returns; when empty, any of A-H counts.

    Example:
        "The answer is B. Cats and Dogs" -> B; "option C because A and B are wrong" -> C;
        "A man is walking. So the answer is C" -> C; "A. No wait, B" -> B; "A or B" -> None.
    """
    options = options or dict.fromkeys(DEFAULT_LETTERS, "")
    plain = _with_letters(plain_text(text), options)
    # What follows the last "Answer:" speaks for all, unless it says nothing.
    lead_ins = list(_LEAD_IN.finditer(plain))
    for part in [plain[match.end() :] for match in lead_ins[-1:]] + [plain]:
        named = _named_options(part, options)
        if named:
            return named[0] if len(named) == 1 and named[0] in options else None
    return None


def _with_letters(plain: str, options: Mapping[str, str]) -> str:
    """A text with "option B" for "the second option", unless options speak of first and last themselves."""
    labels = list(options)

    def letter(match: re.Match[str]) -> str:
        ordinal = match["ordinal"].lower()
        position = len(labels) - 1 if ordinal == "last" else _ORDINALS.index(ordinal)
        return f"option {labels[position]}" if position < len(labels) else match[0]

    speak_of_it = any(re.search(_POSITION, wording, re.IGNORECASE) for wording in options.values())
    if speak_of_it or not all(label.isalpha() for label in labels):
        return plain
    alone = _POSITION_ALONE.fullmatch(plain)
    return letter(alone) if alone else _BY_POSITION.sub(letter, plain)


def _named_options(plain: str, options: Mapping[str, str]) -> tuple[str, ...]:
    """The option that a text settles on; several where it hedges, none where it names none."""
    # 1. A letter and nothing else: "B", "(b)", "Option B.".
    alone = _ALONE.fullmatch(plain)
    if alone and not _WRONG_MARK.search(plain) and alone["label"].upper() in options:
        return (alone["label"].upper(),)
    # 2. The wording of one option, or a part of only one, and nothing else but its letter.
    tokens = read_tokens(plain)
    said = [token.text for token in tokens]
    wordings = wording_tokens(options)
    same = [
        label
        for label, wording in wordings.items()
        if said in (wording, [label.lower(), *wording], [*wording, label.lower()])
    ]
    same = same or [label for label, wording in wordings.items() if _is_part(said, wording)]
    if len(same) == 1:
        return (same[0],)
    # 3. Nothing but letters: several make a list, one and the same is repeated.
    labels = label_pattern(options)
    if re.fullmatch(rf"(?:{_LIST}(?<!\w)(?:{labels})(?!\w))+{_LIST}", plain, re.IGNORECASE):
        return tuple({label.upper() for label in re.findall(labels, plain, re.IGNORECASE)})
    # 4. Letters that are named; wordings where no letter is.
    by_wording = wording_mentions(plain, tokens, options)
    by_letter = letter_mentions(plain, options, by_wording)
    return _settled_options(group_mentions(plain, by_letter), options) or _settled_options(
        group_mentions(plain, by_wording), options
    )


def _is_part(said: Sequence[str], wording: Sequence[str]) -> bool:
    """Whether an answer of two words or more stands in a wording: "feeds the dog"; "both" and its like alone do."""
    if len(said) < 2 and said not in (["both"], ["neither"], ["all"], ["none"]):
        return False
    return any(wording[start : start + len(said)] == said for start in range(len(wording) - len(said) + 1))


# ---- what they settle on ----


def _settled_options(groups: Sequence[Group], options: Mapping[str, str]) -> tuple[str, ...]:
    """What is left when a text was followed from its first group to its last: one option, or several that hedge."""
    chosen: tuple[str, ...] = ()
    is_declared = False
    rejected: set[str] = set()
    for group in groups[_repeated_options(groups, options) :]:
        labels = group.labels
        is_asserted = group.stance in (Stance.CHOSEN, Stance.RIGHT) or group.stands_out
        # 1. What is ruled out leaves; what is conceded, or names no option and is not asserted, says nothing.
        if group.stance is Stance.REJECTED:
            rejected.update(labels)
            chosen = tuple(label for label in chosen if label not in labels)
            is_declared = is_declared and bool(chosen)
            continue
        if group.stance is Stance.CONCEDED or not (is_asserted or set(labels) & set(options)):
            continue
        rejected.difference_update(labels)
        # 2. "A, but B", "A. No wait, B", "so B", "the answer is B" replace what was said before, and so does a choice
        #    of what was offered, or of what was named and no more.
        is_narrowed = set(labels) < set(chosen)
        is_turned = group.turn in ("correction", "but", "so")
        is_answered = group.stance is Stance.CHOSEN and group.turn != "or"
        if is_turned or is_answered or (is_asserted and (is_narrowed or not is_declared)):
            chosen, is_declared = labels, True
        elif is_narrowed and not is_declared:
            chosen = labels
        # 3. What is offered beside an answer, or called as right, hedges; what is only named besides does not count.
        elif not is_declared or group.turn == "or" or is_asserted or group.is_listed:
            chosen = tuple(dict.fromkeys((*chosen, *labels)))
    if chosen:
        return chosen
    # 4. "A, C and D are wrong" leaves B; "while the dog is fed" says so in passing.
    left = [label for label in options if label not in rejected]
    if rejected and len(left) == 1:
        return (left[0],)
    return tuple(dict.fromkeys(label for group in groups if group.stance is Stance.CONCEDED for label in group.labels))


def _repeated_options(groups: Sequence[Group], options: Mapping[str, str]) -> int:
    """How many groups at the start only go through the options, as the question does: "(A) cat (B) dog (C) hen"."""
    count = 0
    for group, label in zip(groups, options, strict=False):
        is_in_turn = group.turn is None or (group.turn == "or" and group.is_listed)
        if group.labels != (label,) or group.stance is not Stance.NAMED or not is_in_turn:
            break
        count += 1
    return count if count >= min(3, len(options)) else 0
