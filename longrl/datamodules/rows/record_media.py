"""The media of a record as files.

A field holds one item, a list of them, or nothing. What an item may be:

- a path, from `media_root` on, `file://`, or a URL (`https://`, `s3://`; read if `data.allow_remote_media` is true);
- its content: bytes, base64, a data URI, `{"bytes", "path"}` as parquet files and `datasets` have it, or a PIL image;
- either of these under the name of its kind, `{"video": ...}`, as verl's records have it;
- of a video, its frames: a list of such images, a folder, or `{"frames": [...], "fps": 3}` with `times` in the place of
  `fps` where they are not even. A list of nothing but what says that it is an image (by suffix or type) is one video.
  Beside the field, `fps` or `frame_times` (seconds; of several videos a list for each) say when frames are on show.

Content and lists of frames are written below `media_root`, named by what they hold, each once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import mimetypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX, frame_list_text, frame_times
from longrl.datamodules.rows.media_files import find_video
from longrl.io.atomic import atomic_write
from longrl.types import MediaKind

FOLDERS: dict[MediaKind, str] = {"video": ".videos", "image": ".images", "audio": ".audios"}
"""Below `media_root`."""
PICTURE_URI = re.compile(r"data:image/(?!gif|avif)")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DATA_URI = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?(?P<flags>(;[\w.+=-]+)*),")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256,}+={0,2}\s*")
"""No path is so long without a dot. The plus after the braces: nothing is given back, or blanks take quadratic time."""
MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\x1aE\xdf\xa3",
    b"OggS",
    b"ID3",
    b"fLaC",
)
"""First bytes of images, videos and sounds; of mp4 and mov those from the fifth on are `ftyp`."""
Timing = Mapping[str, Any]
"""`fps` or `times` of a list of frames."""


@dataclass(frozen=True)
class RecordMedia:
    """One kind of media of a record.

    Args:
        kind: of its items.
        media_root: where relative paths start, and where content is written.
    """

    kind: MediaKind
    media_root: str | None

    def paths(self, value: Any, record: Mapping[str, Any]) -> tuple[str, ...]:
        """Files of all items of a field.

        Args:
            value: of the field.
            record: says when single frames are on show.

        Raises:
            ValueError: an item is none of the above, or there is no place to write it to.
        """
        if value is None or (isinstance(value, Sequence) and not len(value)):
            return ()
        is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
        items = list(value) if is_list else [value]
        if self.kind == "video" and is_list and all(map(_is_picture, items)):
            items = [items]
        timings = [_timing(record, position, len(items)) for position in range(len(items))]
        return tuple(map(self._path, items, timings))

    def _path(self, item: Any, timing: Timing) -> str:
        if isinstance(item, str) and item:
            return self._path_of_text(item, timing)
        if isinstance(item, Mapping):
            if self.kind == "video" and "frames" in item:
                times = item.get("times", item.get("frame_times"))
                return self._frame_list(item["frames"], _given(fps=item.get("fps"), times=times) or timing)
            if item.get("bytes") is not None:
                return self._write(bytes(item["bytes"]), Path(str(item.get("path") or "")).suffix)
            if item.get("path"):
                return self._path_of_text(str(item["path"]), timing)
            if item.get(self.kind) is not None:
                return self._path(item[self.kind], timing)
        if isinstance(item, (bytes, bytearray, memoryview)) and len(item):
            return self._write(bytes(item), "")
        if self.kind == "video" and isinstance(item, (list, tuple)) and item:
            return self._frame_list(item, timing)
        if self.kind == "image" and hasattr(item, "save"):  # a PIL image
            buffer = io.BytesIO()
            item.save(buffer, "TIFF" if item.mode in ("CMYK", "LAB", "F") else "PNG")  # PNG has no such pixels
            return self._write(buffer.getvalue(), "")
        raise ValueError(f"must hold file paths or media, got {type(item).__name__} {str(item)[:60]!r}")

    def _path_of_text(self, text: str, timing: Timing) -> str:
        content = _content_of_text(text)
        if content is not None:
            return self._write(*content)
        if text.startswith("file://"):
            return unquote(urlsplit(text).path)
        if "://" in text:
            return text
        path = find_video(text, self.media_root) if self.kind == "video" else self._joined(text)
        if self.kind == "video" and timing and os.path.isdir(path):
            names = sorted(filter(_is_picture, os.listdir(path)), key=_natural_order)
            return self._frame_list([os.path.join(text, name) for name in names], timing)
        return path

    def _joined(self, path: str) -> str:
        return os.path.join(self.media_root or "", os.path.expanduser(path))

    def _frame_list(self, frames: Sequence[Any], timing: Timing) -> str:
        """The file of a list of frames, which names those below `media_root` from its own folder on."""
        images = RecordMedia("image", self.media_root)
        paths = [images._path(frame, {}) for frame in frames]
        if not paths:
            raise ValueError("has a video without a frame")
        frame_times(len(paths), timing.get("fps"), timing.get("times"))  # checked now
        root = self._written_folder()
        below = os.path.join(os.path.abspath(self.media_root or ""), "")
        is_below = ["://" not in path and os.path.abspath(path).startswith(below) for path in paths]
        names = [os.path.relpath(path, root) if near else path for path, near in zip(paths, is_below, strict=True)]
        return self._write(frame_list_text(names, timing).encode(), FRAME_LIST_SUFFIX)

    def _written_folder(self) -> str:
        if self.media_root is None:
            raise ValueError(
                f"holds the content of a {self.kind}; set data.media_root to a folder where it may be written"
            )
        return os.path.join(self.media_root, FOLDERS[self.kind])

    def _write(self, content: bytes, suffix: str) -> str:
        name = hashlib.sha256(content).hexdigest()[:32]
        path = Path(self._written_folder(), name + ("" if self.kind == "image" else suffix.lower()))
        try:
            if not path.exists():
                atomic_write(path, content)  # other ranks write the same file
        except OSError as error:
            raise ValueError(
                f"holds the content of a {self.kind}, which cannot be written to {path.parent} ({error.strerror}); set "
                "data.media_root to a folder where it can, and name other media by absolute paths"
            ) from error
        return str(path)


def _is_picture(item: Any) -> bool:
    """Whether an item says that it is an image."""
    if isinstance(item, Mapping):
        return _is_picture(item.get("path") or item.get("image"))
    if not isinstance(item, str):
        return hasattr(item, "save")  # a PIL image
    return PICTURE_URI.match(item) is not None or urlsplit(item).path.lower().endswith(PICTURE_SUFFIXES)


def _natural_order(name: str) -> list[Any]:
    """Numbers in a name count as numbers: frame 2 comes before frame 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _given(**fields: Any) -> Timing:
    return {name: value for name, value in fields.items() if value is not None}


def _timing(record: Mapping[str, Any], position: int, count: int) -> Timing:
    """What a record says of the frames of its nth video."""
    fps, times = record.get("fps"), record.get("frame_times")
    if isinstance(fps, (list, tuple)):
        fps = fps[position] if len(fps) == count else None
    if isinstance(times, (list, tuple)) and times and isinstance(times[0], (list, tuple)):
        times = times[position] if len(times) == count else None
    return _given(fps=fps, times=times)


def _content_of_text(text: str) -> tuple[bytes, str] | None:
    """Content of a data URI or of base64, and the suffix of its kind; None for a path or a URL.

    Raises:
        ValueError: a data URI that cannot be read.
    """
    uri = DATA_URI.match(text)
    if uri is not None:
        suffix = mimetypes.guess_extension(uri["mime"] or "") or ""
        rest = text[uri.end() :]
        try:
            if "base64" in uri["flags"].split(";"):
                return base64.b64decode("".join(rest.split()), validate=True), suffix
        except binascii.Error as error:
            raise ValueError(f"has a data URI that is no base64 ({error})") from error
        return unquote_to_bytes(rest), suffix
    if BASE64.fullmatch(text) is None:
        return None
    try:
        content = base64.b64decode(text)
    except binascii.Error:
        return None
    return (content, "") if content.startswith(MAGIC) or content[4:8] == b"ftyp" else None
