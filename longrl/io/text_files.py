"""Text files that others wrote: UTF-8, with or without a byte order mark, or an error that says where they are not."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""First bytes -> encoding. The longer ones come first, for UTF-32's begin as UTF-16's."""


@contextmanager
def utf8_file(path: str | Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of UTF-8, open for reading.

    Args:
        path: of the file.
        newline: as `open` has it.

    Raises:
        ValueError: it is in another encoding; the message names the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(_encoding_problem(path, error)) from None


def read_utf8(path: str | Path) -> str:
    """The text of a file; see `utf8_file`."""
    with utf8_file(path) as file:
        return file.read()


def _encoding_problem(path: str | Path, error: UnicodeDecodeError) -> str:
    """Which line is at fault, and how to save the file anew."""
    with open(path, "rb") as file:
        start = file.read(4)
        for mark, encoding in WIDE_MARKS.items():
            if start.startswith(mark):
                return (
                    f"{path} is {encoding}, and must be UTF-8; save it anew, as by "
                    f"`iconv -f {encoding} -t UTF-8 {path} > utf8_{Path(path).name}`"
                )
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                return (
                    f"line {number} of {path} is no UTF-8 (byte 0x{line[found.start]:02x} at place {found.start}); "
                    f"save the file anew, as by `iconv -f LATIN1 -t UTF-8 {path} > utf8_{Path(path).name}`"
                )
    return f"{path} is no UTF-8: {error}"
