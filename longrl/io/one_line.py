"""Text of strangers in one line of a log or a screen: it moves no cursor and hides nothing."""

from __future__ import annotations


def one_line(text: str, max_characters: int | None = None) -> str:
    """The text without line breaks; control characters, of which escape sequences are made, are written as escapes.

    Args:
        text: of whatever origin.
        max_characters: a longer one is cut and ends in dots.
    """
    words = " ".join(text.split())
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in words)
    if max_characters is None or len(shown) <= max_characters:
        return shown
    return f"{shown[:max_characters]}..."
