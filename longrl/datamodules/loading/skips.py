"""Rows that cannot be used: each is listed once, and too many of them end the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from longrl.types import UnusableSample

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
"""The product of a row: a prompt, or for generators of pictures rows as they are."""

CODE_ERRORS = (NameError, AttributeError, ImportError, AssertionError, NotImplementedError, MemoryError)
"""Errors that code or machine is at fault for: they end a run. Any other that making a prompt of one row meets depends
on what the row holds, whoever raises it, and makes it an `UnusableSample`: options are tried before a row is read."""
TORN = "it is torn, and what is there was used"
REASON = ', "reason": '
"""The text between row and reason in a line."""
GRACE_ROWS = 3
"""As many rows may be skipped whatever the share is: one bad file must not stop a small data set."""


class SkipLog:
    """Counts and lists the rows of a split that cannot be used, each once, and raises when they are too many.

    The rule, with n rows and s = `max_share`:

    - at most max(3, s n) different rows may be skipped, and never all of them; none if s is 0;
    - at most 3 + s d + 4 sqrt(s d) may turn out unusable among the first d rows that this rank draws. More is no
      accident (four standard deviations) while the split as a whole keeps to s, so media in a format that does not
      decode end a run at once, not after s n rows.

    Args:
        path: JSONL file to append to, made when the first row is skipped; a line has split, id, path and reason. Rows
            that are shown a torn video in part are listed there too; their lines have `used`: "in part".
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
        self.drawn_unusable: dict[int, UnusableSample] = {}
        """Rows that were drawn and could not be used, by index."""
        self.torn_videos: set[str] = set()
        """Files that were cut off, and that rows were shown in part; see `VideoSampling.torn`."""
        self._listed: set[int] = set()
        self._num_unusable = 0
        self.num_drawn = 0
        """Rows drawn so far, usable or not."""

    def __len__(self) -> int:
        """Different rows skipped so far."""
        return len(self._listed)

    @property
    def allowed(self) -> float:
        """Rows that may be skipped."""
        return max(GRACE_ROWS, self.max_share * self.num_rows) if self.max_share > 0 else 0

    def add_known(self, items: Iterable[UnusableSample]) -> None:
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

    def add_drawn(self, error: UnusableSample) -> None:
        """Notes an unusable row that was drawn; raises ValueError if these are too many."""
        self.drawn_unusable[error.index] = error
        if error.index in self._listed:
            return
        self._listed.add(error.index)
        self._num_unusable += 1
        self._write([error])
        expected = self.max_share * self.num_drawn
        if self._num_unusable > GRACE_ROWS + expected + 4 * math.sqrt(expected):
            raise self._too_many(f"{self._num_unusable} of the first {self.num_drawn}", error)
        self._check_all(error)

    def add_torn(self, row_id: str, paths: Iterable[str]) -> None:
        """Lists torn videos of which a row was shown what is there, each once. They do not count as skipped."""
        new = [path for path in paths if path not in self.torn_videos]
        self.torn_videos.update(new)
        lines = [self._line(UnusableSample(path, TORN, row_id=row_id)) | {"used": "in part"} for path in new]
        self._append(lines)
        for path in new:
            logger.info("%s row %r: %s: %s", self.split, row_id, path, TORN)

    def _line(self, item: UnusableSample) -> dict[str, str | None]:
        return {"split": self.split, "id": item.row_id, "path": item.path, "reason": str(item)}

    def _append(self, lines: Sequence[Mapping[str, str | None]]) -> None:
        if not lines or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A resumed run knows a row by all but the reason, whose wording may have changed with the release.
        before = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        known = {line.partition(REASON)[0] for line in before}
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in map(json.dumps, lines) if line.partition(REASON)[0] not in known)

    def _write(self, items: Sequence[UnusableSample]) -> None:
        if not items or not self.writes:
            return
        self._append(list(map(self._line, items)))
        more = f" and {len(items) - 1} more" if len(items) > 1 else ""
        logger.warning("skipped %s row %r%s: %s; see %s", self.split, items[0].row_id, more, items[0], self.path)

    def _check_all(self, last: UnusableSample) -> None:
        if len(self) > self.allowed or len(self) == self.num_rows:
            raise self._too_many(f"{len(self)} of all {self.num_rows}", last)

    def _too_many(self, count: str, last: UnusableSample) -> ValueError:
        return ValueError(
            f"data.max_skipped_share={self.max_share} of the {self.split} rows may be skipped, but {count} cannot be "
            f"used, the last (row {last.row_id!r}) because: {last}. All are listed in {self.path}; repair or remove "
            "them, or raise data.max_skipped_share"
        )
