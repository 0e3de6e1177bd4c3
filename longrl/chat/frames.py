"""Frames of videos, and whole videos, in a message: named in the request, sent when the call is made."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MessagePart = dict[str, Any]
FRAME_SCHEME = "frame:"
"""An image part's url begins with this where a request names its image instead of holding it."""
JPEG_QUALITY = 85
VIDEO_SCHEME = "video:"
"""The same of a video part."""


def frame_name(digest: str, index: int, max_side: int) -> str:
    """The name of a frame in a request, made of all that decides its pixels.

    Args:
        digest: of the file, or key of the media item, that holds the frame.
        index: of the frame in it.
        max_side: longest side in pixels.
    """
    return f"{FRAME_SCHEME}{digest[:32]}/{index}/{max_side}q{JPEG_QUALITY}"


def frame_parts(names: Sequence[str], seconds: Sequence[float]) -> list[MessagePart]:
    """Message parts of a video's frames, each behind its time."""
    parts: list[MessagePart] = []
    for name, second in zip(names, seconds, strict=True):
        parts.append({"type": "text", "text": f"[{second:.1f} s]"})
        parts.append(image_part(name))
    return parts


def image_part(url: str) -> MessagePart:
    """The message part of an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def video_name(digest: str) -> str:
    """The name of a video in a request, by the hash of its file's content."""
    return f"{VIDEO_SCHEME}{digest[:32]}"


def video_part(url: str) -> MessagePart:
    """The message part of a video, as vLLM's server takes it."""
    return {"type": "video_url", "video_url": {"url": url}}


def video_data_url(path: str | Path) -> str:
    """A video file as the url of a message part.

    Raises:
        OSError: it cannot be read.
    """
    kind = mimetypes.guess_type(str(path))[0] or ""
    if not kind.startswith("video/"):
        kind = "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def data_url(image: Image) -> str:
    """A picture as the url of a message part."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
