"""What is wrong with rows before one is rendered: media that are missing, lie elsewhere, or that no family reads."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence

from longrl.datamodules.loading.render import RowRenderer, files_of, ordered_media
from longrl.datamodules.media.frame_lists import frame_files
from longrl.datamodules.media.remote import NOT_ALLOWED, check_access, is_remote
from longrl.datamodules.rows.media_files import copies_of
from longrl.types import Row, UnusableSample


def unusable_rows(rows: Sequence[Row], renderer: RowRenderer, check_files: bool) -> list[UnusableSample]:
    """Rows that cannot be rendered whatever their files hold, in their order; they are skipped at their turn.

    Args:
        rows: of a split.
        renderer: knows the family, and which media may be fetched.
        check_files: look whether local files exist, and ask for a few of those that lie elsewhere.

    Raises:
        ValueError: nothing can be fetched from where media lie.
    """
    is_file = functools.cache(os.path.isfile)  # many rows may ask about one video
    reads = functools.cache(renderer.family.reads_media)
    unusable = []
    for index, row in enumerate(rows):
        kinds = dict.fromkeys(kind for kind, _ in ordered_media(row))
        unread = [kind for kind in kinds if not reads(kind)]
        try:
            if unread:
                name = type(renderer.family).__name__
                raise UnusableSample(
                    None, f"{name} reads no {unread[0]}s; use a family that does, or leave such rows out"
                )
            for path in files_of(row):
                _check_files(frame_files(path) if check_files else (path,), renderer, is_file if check_files else None)
        except UnusableSample as error:
            unusable.append(error.of_row(index, row.id))
    if check_files and renderer.remote.folder is not None:
        check_access(path for row in rows for path in files_of(row))
    return unusable


def _check_files(
    paths: Iterable[str], renderer: RowRenderer, is_file: functools._lru_cache_wrapper[bool] | None
) -> None:
    for path in paths:
        if is_remote(path):
            if renderer.remote.folder is None:
                raise UnusableSample(path, NOT_ALLOWED)
        elif is_file is not None and not is_file(path):
            raise UnusableSample(path, _why_missing(path))


def _why_missing(path: str) -> str:
    copies = copies_of(path)
    if not copies:
        return "the file does not exist"
    return (
        f"it exists {len(copies)} times, as {' and '.join(copies)}; write the one that is meant with its folder and "
        "suffix, or keep one of them alone below media_root"
    )
