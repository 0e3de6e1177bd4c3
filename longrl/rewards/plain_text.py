"""The text of an answer without what only lays it out: Markdown, LaTeX, tags, quotation marks."""

from __future__ import annotations

import html
import re
import unicodedata

KEPT_CHARS = 2000
"""Of a long text this many characters at either end are read: answers stand there, and all work stays linear."""
GAP = "\n...\n"
"""Stands for what was left out between the two ends; no rule reads across it."""

_TAG = re.compile(r"<(?![A-Z]>)[|/]?(\w{1,20})[^<>\n]{0,80}>")
_LINE_TAGS = ("br", "div", "h1", "h2", "h3", "li", "ol", "p", "table", "tr", "ul")
_BOXED = re.compile(r"(\}[\s$,;]{0,4})?\\{1,2}(?:boxed|fbox|framebox)\b")
_LATEX = re.compile(r"\\{1,2}(?:color|textcolor)\s?\{\w{0,20}\}|\\{1,2}[A-Za-z]{2,20}\*?|\\{1,2}[()\[\],;:! \\]?")
_REPLACED = (
    (re.compile(r"~~[^~\n]{1,200}~~"), " "),  # struck out
    (re.compile(r"\[ ?\]"), "\u2717"),  # a list with boxes to tick
    (re.compile(r"\[[xX\u2713\u2714]\]"), "\u2713"),
    (re.compile(r"[-=]{1,2}>|\u2192|\u21d2"), ": "),
    (re.compile(r"[*`$_#~{}\"\u201c\u201d\u201e\u00ab\u00bb\u300c-\u300f\ufe0f]"), " "),
    (re.compile(r"(?<!\w)'(\w[^'\n]{0,80})'(?!\w)"), r" \1 "),
    (re.compile(r"^[ >]+", re.MULTILINE), ""),  # a quoted line
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r" ?\n[ \n]*"), "\n"),
)


def plain_text(text: str) -> str:
    r"""Lines without Markdown, LaTeX, tags and quotation marks, in NFKC; at most `KEPT_CHARS` from either end.

    What markup says is put into words: `\boxed{B}` is "answer: B", and a second box beside it "or answer: C".
    """
    # Cut before and after NFKC, for both its time and its length can be many times those of the text.
    text = unicodedata.normalize("NFKC", cut_middle(text))
    text = html.unescape(cut_middle(text))
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u2212", "-")
    text = _TAG.sub(_said_by_tag, text)
    text = _LATEX.sub(" ", _BOXED.sub(lambda box: " or answer: " if box[1] else " answer: ", text))
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip()


def cut_middle(text: str) -> str:
    """The two ends of a text that is longer than both."""
    return text if len(text) <= 2 * KEPT_CHARS else text[:KEPT_CHARS] + GAP + text[-KEPT_CHARS:]


def _said_by_tag(tag: re.Match[str]) -> str:
    """What a tag means in a text: an answer, a new line, the next cell of a table, or nothing."""
    name = tag[1].lower()
    if name == "answer" and "/" not in tag[0]:
        return "\nanswer: "
    if name in ("td", "th"):
        return " | "
    return "\n" if name in _LINE_TAGS else " "
