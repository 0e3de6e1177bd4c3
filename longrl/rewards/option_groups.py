"""Options that a text names together, and how it means them: "A, C and D are wrong" is one group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from longrl.rewards.option_mentions import Mention
from longrl.rewards.option_stance import (
    CUT,
    Stance,
    Verdict,
    excepts,
    has_mark,
    is_likewise,
    stance_before,
    turn_between,
    verdict_behind,
    words,
)

_JOINT = re.compile(
    rf"[\s()\[\]]*(?:(?:[,/&|+\u3001\u060c]|{words('joint')})\s*)+(?:(?:{words('naming')}|the|either|both)\s*)*"
    r"[\s()\[\]]*|[()\[\] ]+",
    re.IGNORECASE,
)
_CONJUNCTION = re.compile(rf"{words('joint')}|[/&|]", re.IGNORECASE)
_SINGULAR = re.compile(
    r"[)\]]? (?:is|was|does|isn't|doesn't|has|must|ist|es|est|n'est|ne|\u00e8|\u00e9|no|s\u00ed|yes)\b"
)
_COMPARES = re.compile(r"\s*than\b|[^.;!?\n]*\bunlike\W*$", re.IGNORECASE)
_ENDS_OPENING = re.compile(rf"\s*(?:[^\w\s]|\n|$|{words('because', 'or')}|(?:as|for|rather|over)\b)", re.IGNORECASE)
_STARTS_SENTENCE = re.compile(r"(?:^|[.,;:!?\n\u2014-])\W*$")


@dataclass(frozen=True)
class Group:
    """Options that are named together and meant alike."""

    labels: tuple[str, ...]
    stance: Stance
    turn: str | None
    """What the text does between the group before and this one, see `turn_between`."""
    stands_out: bool
    """Opens the text, as "B because ...", or is the last sentence of it."""
    is_listed: bool
    """Its first option stands as in a list, "B. ..."."""


def group_mentions(plain: str, mentions: Sequence[Mention]) -> list[Group]:
    """Mentions as groups, in order, with what the text says of each."""
    runs = _joined_mentions(plain, mentions)
    groups: list[Group] = []
    last_end = verdict_end = 0
    verdict = Verdict(Stance.NAMED, 0)
    for run, following in zip(runs, [*runs[1:], None], strict=False):
        # 1. The text on either side that is about these options alone.
        before = plain[verdict_end : run[0].start]
        after = plain[run[-1].end :] if following is None else plain[run[-1].end : following[0].start] + CUT
        # 2. What it says: "A is less likely than B" speaks for B; a tick before an option leaves none behind it.
        is_compared = verdict.stance is Stance.REJECTED and _COMPARES.match(before)
        ahead = Stance.RIGHT if is_compared else stance_before(before)
        verdict = Verdict(Stance.NAMED, 0) if has_mark(before) else verdict_behind(after)
        if groups and verdict.stance is Stance.NAMED and is_likewise(after):
            verdict = Verdict(groups[-1].stance, 0)
        behind = verdict.stance
        if behind is Stance.REJECTED and excepts(before):
            ahead = behind = Stance.RIGHT  # "all but B are wrong"
        # 3. All are meant alike, or the first or last apart from the others.
        for members, stance in _members_by_stance(plain, run, ahead, behind, is_singular=bool(_SINGULAR.match(after))):
            start, end = members[0].start, members[-1].end
            gap = plain[last_end:start]
            groups.append(
                Group(
                    labels=tuple(mention.label for mention in members),
                    stance=stance,
                    turn=turn_between(gap) if groups else None,
                    stands_out=_opens_text(plain, start, end) or _closes_text(plain, last_end, members, groups),
                    is_listed=members[0].is_listed,
                )
            )
            last_end = end
        verdict_end = run[-1].end + verdict.length
    return groups


def _joined_mentions(plain: str, mentions: Sequence[Mention]) -> list[list[Mention]]:
    """Runs of mentions with nothing but commas and conjunctions between them; a label that comes again starts anew."""
    runs: list[list[Mention]] = []
    for mention in mentions:
        labels = [known.label for known in runs[-1]] if runs else []
        gap = plain[runs[-1][-1].end : mention.start] if runs else ""
        if labels == [mention.label] and not re.search(r"\w", gap):
            runs[-1] = [mention]  # "B: B"
        elif labels and mention.label not in labels and _JOINT.fullmatch(gap):
            runs[-1].append(mention)
        else:
            runs.append([mention])
    return runs


def _members_by_stance(
    plain: str, run: list[Mention], ahead: Stance, behind: Stance, *, is_singular: bool
) -> list[tuple[list[Mention], Stance]]:
    """The members of a run that are meant alike, and how.

    Args:
        plain: the text.
        run: options with nothing but commas and conjunctions between them.
        ahead: what the text before them says.
        behind: what the text behind them says.
        is_singular: whether that speaks of one.
    """
    joints = [plain[left.end : right.start] for left, right in pairwise(run)]
    first, rest, last = run[:1], run[1:], run[-1:]
    if rest and is_singular and (behind is Stance.REJECTED or not _CONJUNCTION.search(joints[-1])):
        return [(run[:-1], ahead), (last, behind)]  # "not A, B is right", "it is C and A is wrong"
    if rest and ahead is Stance.CHOSEN and behind is Stance.REJECTED:
        return [(first, ahead), (rest, behind)]  # "it is C, A and B are wrong"
    is_headed = plain[: run[0].start].endswith((":", ": "))  # "Wrong: A, B"
    if len(rest) == 1 and ahead is Stance.REJECTED and not is_headed and not _CONJUNCTION.search(joints[0]):
        return [(first, ahead), (rest, behind)]  # "not A, B"
    return [(run, behind if ahead is Stance.NAMED or behind is Stance.REJECTED else ahead)]


def _opens_text(plain: str, start: int, end: int) -> bool:
    """Whether the text begins with an option that is no subject of a sentence: "B.", "B because ..."."""
    return not re.search(r"\w", plain[:start]) and _ENDS_OPENING.match(plain, end) is not None


def _closes_text(plain: str, last_end: int, members: list[Mention], groups: Sequence[Group]) -> bool:
    """Whether the text ends with an option that is a sentence of its own, and not the last of a list: "B; C"."""
    start, end = members[0].start, members[-1].end
    if re.search(r"\w", plain[end:]) or not _STARTS_SENTENCE.search(plain[max(0, start - 12) : start]):
        return False
    is_told_apart = re.search(r"\w", plain[last_end:start]) and not (
        groups and groups[-1].is_listed and members[0].is_listed
    )
    return not groups or bool(is_told_apart) or any(members[0].label in group.labels for group in groups)
