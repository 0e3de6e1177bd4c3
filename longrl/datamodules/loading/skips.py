"""Rows that cannot be used: each is listed once, and too many of them end the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
"""What rows are made into: prompts, or rows as they are for generators of pictures (longrl/diffusion/prompt_files.py)."""

GRACE_ROWS = 3
"""As many rows may be skipped whatever the share is: one bad file must not stop a small data set."""


@dataclass(frozen=True)
class Skipped:
    """What takes the place of a prompt whose row cannot be used."""

    index: int
    """Place of the row among its split's."""
    id: str
    reason: str
    path: str | None = None


class SkipLog:
    """Counts and lists the rows of a split that cannot be used, each once, and raises when they are too many.

    The rule, with n rows and s = `max_share`:

    - at most max(3, s n) different rows may be skipped, and never all of them; none if s is 0;
    - at most 3 + s d + 4 sqrt(s d) may turn out unusable among the first d rows that this rank draws. More is no
      accident (four standard deviations) while the split as a whole keeps to s, so media in a format that does not
      decode end a run at once, not after s n rows.

    Args:
        path: JSONL file to append to, made when the first row is skipped; a line has split, id, path and reason.
        split: name of the rows in lines and messages.
        num_rows: rows in the split.
        max_share: share of them that may be skipped.
        writes_known: write what `add_known` is told; False on all ranks but one, since all know the same.
        writes: write at all; False where another rank reads the same rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str,
        num_rows: int,
        max_share: float,
        writes_known: bool = True,
        writes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.split = split
        self.num_rows = num_rows
        self.max_share = max_share
        self.writes_known = writes_known
        self.writes = writes
        self._listed: set[int] = set()
        self._found = 0
        self._drawn = 0

    def __len__(self) -> int:
        """Different rows skipped so far."""
        return len(self._listed)

    def add_known(self, items: Iterable[Skipped]) -> None:
        """Lists rows that were found unusable before any was drawn.

        Raises:
            ValueError: too many rows were skipped.
        """
        items = list(items)
        self._listed.update(item.index for item in items)
        if self.writes_known:
            self._write(items)
        if items:
            self._check_all(items[-1])

    def draw(self, item: Item | Skipped) -> Item | None:
        """The prompt that was drawn, or None if its row is skipped.

        Raises:
            ValueError: too many rows were skipped.
        """
        self._drawn += 1
        if not isinstance(item, Skipped):
            return item
        if item.index not in self._listed:
            self._listed.add(item.index)
            self._found += 1
            self._write([item])
            self._check_drawn(item)
            self._check_all(item)
        return None

    def _write(self, items: Sequence[Skipped]) -> None:
        if not items or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = set(self.path.read_text("utf-8").splitlines()) if self.path.exists() else set()  # a resumed run
        rows = [{"split": self.split, "id": item.id, "path": item.path, "reason": item.reason} for item in items]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in map(json.dumps, rows) if line not in known)
        more = f" and {len(items) - 1} more" if len(items) > 1 else ""
        logger.warning("skipped %s row %s%s: %s; see %s", self.split, items[0].id, more, items[0].reason, self.path)

    def _check_all(self, last: Skipped) -> None:
        allowed = max(GRACE_ROWS, self.max_share * self.num_rows) if self.max_share > 0 else 0
        if len(self) > allowed or len(self) == self.num_rows:
            raise self._too_many(f"{len(self)} of all {self.num_rows}", last)

    def _check_drawn(self, last: Skipped) -> None:
        expected = self.max_share * self._drawn
        if self._found > GRACE_ROWS + expected + 4 * math.sqrt(expected):
            raise self._too_many(f"{self._found} of the first {self._drawn}", last)

    def _too_many(self, count: str, last: Skipped) -> ValueError:
        return ValueError(
            f"data.max_skipped_share={self.max_share} of the {self.split} rows may be skipped, but {count} cannot be "
            f"used, the last (row {last.id!r}) because: {last.reason}. All are listed in {self.path}; repair or remove "
            "them, or raise data.max_skipped_share"
        )
