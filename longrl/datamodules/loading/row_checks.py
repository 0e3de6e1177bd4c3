"""What is wrong with rows before one is rendered: media that are missing, lie elsewhere, or that no family reads."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.shown_media import files_of, ordered_media
from longrl.datamodules.loading.traces import trace_media
from longrl.datamodules.media.frame_lists import frame_files
from longrl.datamodules.media.media_roots import MediaRoots
from longrl.datamodules.media.remote import NOT_ALLOWED, check_access, is_remote
from longrl.datamodules.media.subtitles import subtitle_files
from longrl.datamodules.rows.media_files import copies_of
from longrl.types import Row, UnusableSample


def unusable_rows(
    rows: Sequence[Row], renderer: RowRenderer, check_files: bool, roots: Sequence[MediaRoots], max_outside: float
) -> list[UnusableSample]:
    """Rows that cannot be rendered whatever their files hold, in their order; they are skipped at their turn.

    Args:
        rows: of a split.
        renderer: knows the family, and which media may be fetched.
        check_files: look whether local files exist, and ask for a few of those that lie elsewhere.
        roots: where the local media of each row may lie.
        max_outside: rows that may name others.

    Raises:
        ValueError: nothing can be fetched from where media lie, or too many rows name files outside the roots.
    """
    is_file = functools.cache(os.path.isfile)  # many rows may ask about one video
    families = [(type(family).__name__, functools.cache(family.reads_media)) for family in renderer.families]
    unusable = []
    outside: list[UnusableSample] = []
    for index, row in enumerate(rows):
        kinds = dict.fromkeys(kind for kind, _ in [*ordered_media(row), *trace_media(row)])
        unread = [(name, kind) for name, reads in families for kind in kinds if not reads(kind)]
        try:
            for name, kind in unread[:1]:
                raise UnusableSample(None, f"{name} reads no {kind}s; use a family that does, or leave such rows out")
            named = (*files_of(row), *_subtitle_files(row, renderer))
            problem = next(filter(None, (_outside(path, roots[index], check_files) for path in named)), None)
            if problem is not None:
                outside.append(problem)
                raise problem
            for path in files_of(row):
                _check_files(frame_files(path) if check_files else (path,), renderer, is_file if check_files else None)
        except UnusableSample as error:
            unusable.append(error.of_row(index, row.id))
    if len(outside) > max_outside or (outside and len(outside) == len(rows)):
        raise ValueError(f"{len(outside)} of {len(rows)} rows name media that may not be read, the first: {outside[0]}")
    if check_files and renderer.remote.folder is not None:
        check_access(path for row in rows for path in files_of(row))
    return unusable


def _subtitle_files(row: Row, renderer: RowRenderer) -> list[str]:
    """Those that the row itself names."""
    return subtitle_files(row, "record") if renderer.subtitles.source == "record" else []


def _outside(path: str, roots: MediaRoots, follow: bool) -> UnusableSample | None:
    """What is wrong with where a file lies, or one of its frames."""
    try:
        roots.check(path, follow)
        for frame in frame_files(path)[1:] if follow else ():
            roots.check(frame)
    except UnusableSample as error:
        return error
    return None


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
