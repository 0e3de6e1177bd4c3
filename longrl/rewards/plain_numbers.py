r"""Texts with numbers in one spelling: what LaTeX, Markdown and Unicode add is taken off, what they mean stays.

`\boxed{1\,234\text{ cm}}` becomes `1234 cm`, and the characters of "3 to the power of 2" become `3^2`, never 32.
"""

from __future__ import annotations

import re
import unicodedata

MAX_NUMBER_CHARS = 1000
"""Of a longer text only the end is read."""


def end_of_text(text: str, max_chars: int) -> str:
    """The text, or the end of a longer one without the word or number that is cut."""
    return text if len(text) <= max_chars else _CUT.sub("", text[-max_chars:])


_CUT = re.compile(r"\A[!-~]+")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{..}` with balanced braces; None when there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip() or None
    return None


# ---- Unicode ----

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufe0e\ufe0f\u20e3\ufeff]")
_FRACTIONS = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_SUPERSCRIPT = re.compile(f"[{_SUPERSCRIPTS}]+")
_CHARACTERS = str.maketrans(
    {
        "\u00ba": "\u00b0", "\u02da": "\u00b0",  # degree signs that NFKC makes an "o", or a space and a ring
        "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2015": "-", "\u2212": "-",
        "\u2116": "#", "\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u2715": "\u00d7", "\u22c5": "*", "\u00b7": "*",
        "\u2217": "*",
        "\u2018": "'", "\u2019": "'", "\u00b4": "'", "\u2032": "'", "\u201c": '"', "\u201d": '"', "\u2033": '"',
        "\u301c": "~", "\uff5e": "~", "\u223c": "~", "\u2248": "~", "\u2243": "~", "\u2245": "~", "\u3002": ". ",
        "\u3001": ", ", "\u2264": "<=", "\u2265": ">=", "\u2a7d": "<=", "\u2a7e": ">=", "\u2260": "!=",
    }
)  # fmt: skip


def plain_characters(text: str) -> str:
    """One spelling of digits, signs, fractions and exponents; NFKC alone would read the square of 3 as 32."""
    text = _INVISIBLE.sub("", text)
    text = _FRACTIONS.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{unicodedata.normalize('NFKC', match[0])}", text)
    text = text.translate(_CHARACTERS)  # before NFKC, which takes some of them apart
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


# ---- LaTeX ----

_TEXT_MACRO = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mathtt|operatorname|mbox|hbox|num|bm|boxed|fbox)\s*"
    r"\{([^{}]*)\}"
)
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{,\}", ","),  # 1{,}234
        (r"(?<=\d)\\[,;:! ](?=\d)", ""),  # 1\,234
        (r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits|quad|qquad)(?![a-zA-Z])", " "),
        (r"\\[,;:! ()\[\]]|\\n(?![a-zA-Z])", " "),
        (r"\\([%$#&_{}])", r"\1"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", "\u00b0"),
        (r"\\times(?![a-zA-Z])", "\u00d7"),
        (r"\\(?:cdot|ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:pm|mp)(?![a-zA-Z])", "\u00b1"),
        (r"\\(?:approx|sim|simeq|cong|thickapprox)(?![a-zA-Z])", "~"),
        (r"\\(?:le|leq|leqslant)(?![a-zA-Z])", "<="),
        (r"\\(?:ge|geq|geqslant)(?![a-zA-Z])", ">="),
        (r"\\(?:lt|ll)(?![a-zA-Z])", "<"),
        (r"\\(?:gt|gg)(?![a-zA-Z])", ">"),
        (r"\\(?:ne|neq)(?![a-zA-Z])", "!="),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
        (r"\\(?:Rightarrow|implies|rightarrow|to|therefore)(?![a-zA-Z])", "=>"),
        (r"(?<![\\a-zA-Z])sqrt(?=\s*\d)", r"\\sqrt "),
        (r"\\[dtc]?frac(?![a-zA-Z])", r"\\frac"),
    )
)


def plain_latex(text: str) -> str:
    r"""LaTeX without what only shapes it; `\frac`, `\sqrt` and commands that are not known stay."""
    for _ in range(2):  # \mathbf{\text{42}}
        text = _TEXT_MACRO.sub(r" \1 ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


# ---- Markdown ----

_MARKDOWN = tuple(
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"^[ \t]*(?:```\w*|#{1,6}[ \t]|>[ \t]+(?=[A-Za-z])|[*\u2022][ \t]+)", ""),
        (r"</?[A-Za-z][A-Za-z0-9]*\s*/?>", " "),
        (r"`+", " "),
        (r"(?<!\d)\*\*|\*\*(?!\d)", " "),  # 2**3 is a power
        (r"(?<![\w*)\]}])\*(?=[\w$\\-])|(?<=[\w$}%.])\*(?![\w*(\\ ])", " "),
        (r"(?<!\w)_+(?=\w)|(?<=[^\W_])_+(?!\w)", " "),
        (r'["\u00ab\u00bb]|(?<!\d)\'(?=\d)|(?<![A-Za-z])\'(?![A-Za-z\d])', " "),
    )
)


def plain_markdown(text: str) -> str:
    """Text without emphasis, headings, code fences, tags and quotation marks."""
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    return text


_CURRENCY = re.compile("[$\u00a2-\u00a5\u20a0-\u20bf]")
_SIGNED_CURRENCY = re.compile(rf"([-+])[ ]?{_CURRENCY.pattern}(?=[\d.])")


def plain_number_text(text: str) -> str:
    """A text as numbers are read from it: one spelling, no wrappers, at most `MAX_NUMBER_CHARS` of its end."""
    text = plain_characters(end_of_text(text, MAX_NUMBER_CHARS))
    text = plain_markdown(plain_latex(end_of_text(text, MAX_NUMBER_CHARS)))
    return _CURRENCY.sub(" ", _SIGNED_CURRENCY.sub(r"\1", text))
