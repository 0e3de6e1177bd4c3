"""Which media a row shows, in which order, and what is left of it without any."""

from __future__ import annotations

from dataclasses import replace

from longrl.datamodules.loading.traces import trace_media
from longrl.models.chat_tokens import MEDIA_TAG
from longrl.types import MediaKind, Row


def without_media(row: Row) -> Row:
    """The row as a blind model is asked it. Which videos it had stays known, for their subtitles (`when_blind`)."""
    metadata = {**row.metadata, "left_out_videos": [*row.videos]} if row.videos else row.metadata
    problem = row.problem if row.messages else MEDIA_TAG.sub("", row.problem).strip()
    messages = []
    for message in row.messages:
        texts = [part for part in message["content"] if part["type"] == "text"]
        messages.append({**message, "content": texts})
    blind = replace(row, videos=(), images=(), audios=(), reasoning=None, problem=problem, metadata=metadata)
    response = None if row.rejected is None else row.response  # a pair stays one
    return replace(blind, messages=tuple(messages), response=response, trace=())


def files_of(row: Row) -> tuple[str, ...]:
    """Paths of all media of a row."""
    return (*row.images, *row.videos, *row.audios, *(path for _, path in trace_media(row)))


def ordered_media(row: Row) -> list[tuple[MediaKind, str]]:
    """Kind and path of each media item, in the order of the problem's tags; else images, videos, sounds.

    Of a conversation in the order of its messages.
    """
    media: list[tuple[MediaKind, str]] = [("image", path) for path in row.images]
    media += [("video", path) for path in row.videos]
    media += [("audio", path) for path in row.audios]
    tags = MEDIA_TAG.findall(row.problem)
    if row.messages:
        tags = [part["type"] for message in row.messages for part in message["content"] if part["type"] != "text"]
    if sorted(tags) != sorted(kind for kind, _ in media):
        return media  # no tags, or tags that the family will refuse
    kinds = [kind for kind, _ in media]
    nth = [tags[:i].count(tag) for i, tag in enumerate(tags)]
    return [media[kinds.index(tag) + n] for tag, n in zip(tags, nth, strict=True)]
