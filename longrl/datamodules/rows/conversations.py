"""Conversations in records: OpenAI's and Hugging Face's `messages`, TRL's `prompt` and `completion`.

A message has a `role` and a `content`, which is text or a list of parts. Parts are
`{"type": "text", "text": ..}` and media, whose source may stand under any of the usual names:

    {"type": "image", "image": SOURCE}, {"type": "video", "video": SOURCE}, {"type": "audio", "audio": SOURCE}
    {"type": "image", "path" | "url" | "base64" | "bytes": SOURCE}
    {"type": "image_url", "image_url": {"url": SOURCE}}, `video_url` and `audio_url` alike
    {"type": "input_image", "image_url": SOURCE}
    {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}
    {"type": "image"}                       the next one of the record's `images`

SOURCE is whatever a record's own fields with media may hold (`record_media.py`). In a content that is text the tags
`<image>`, `<video>` and `<audio>` place the record's `images`, `videos` and `audios`, and there must be as many tags as
media; media that nothing places come first in the first message of the user. Without such media a tag is text.

What follows the last question is a trace if a tool answers in it (`traces.py`). A record may have `tools`, which its
prompt then offers: JSON schemas, or a text that holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.datamodules.rows.record_media import RecordMedia
from longrl.datamodules.rows.traces import OF_PARTS, check_turns, read_calls, read_media_part, trace_start
from longrl.io.jsonl import parse_json
from longrl.models.chat_tokens import MEDIA_TAG
from longrl.types import MediaKind

ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("system", "developer", "user", "assistant", "tool")
}
"""What records call a speaker -> what chat templates do; ShareGPT's names are the first two."""
KINDS: dict[str, MediaKind] = {
    "image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
"""Types of parts that are media."""
TEXTS = ("text", "input_text", "output_text")
Part = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What is said before the last answer, that answer, and the media in their order."""

    messages: tuple[dict[str, Any], ...]
    """As `Row.messages`."""
    response: str | None
    """None where the last message is not the assistant's."""
    media: dict[str, tuple[str, ...]]
    """`images`, `videos`, `audios` -> files."""
    trace: tuple[dict[str, Any], ...] = ()
    """As `Row.trace`; its last turn is the response, too."""

    @property
    def question(self) -> str:
        """Text of the user's last message."""
        asked = [message for message in self.messages if message["role"] == "user"]
        parts = asked[-1]["content"] if asked else []
        return "".join(part.get("text", "") for part in parts).strip()


def is_conversation(record: Mapping[str, Any]) -> bool:
    """True if `messages` or `prompt` of a record is a list of messages."""
    return any(_is_chat(record.get(name)) for name in ("messages", "prompt"))


def _is_chat(value: Any) -> bool:
    listed = _decoded(value)
    return isinstance(listed, Sequence) and bool(listed) and isinstance(listed[0], Mapping) and "role" in listed[0]


def _decoded(value: Any) -> Any:
    """A list of messages that a column holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def listed_messages(value: Any) -> list[Mapping[str, Any]] | None:
    """The messages of a field as they are, those of JSON text too; None where it holds something else, or none."""
    listed = _decoded(value)
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
        return None
    if not all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in listed):
        return None
    return list(listed)


def answer_of_message(message: Mapping[str, Any]) -> str:
    """The text of an assistant's message, behind its thinking where that stands apart.

    Raises:
        ValueError: it is somebody else's, empty, or has media or calls.
    """
    (plain,) = _messages({"answer": [message]}, "answer")
    if plain["role"] != "assistant" or plain["tool_calls"]:
        raise ValueError(f"has an answer that must be a text of the assistant, got {str(message)[:80]}")
    return _response(plain)


def read_conversation(record: Mapping[str, Any], media_root: str | None) -> Conversation:
    """The conversation of a record, with its media as files.

    Raises:
        ValueError: a message has no known role or content, or places media that are not there.
    """
    # 1. All messages, and who speaks last.
    names = ("messages", "conversations", "prompt", "completion")
    listed = [message for name in names for message in _messages(record, name)]
    response = None
    start = trace_start(listed)
    tail = listed[start:] if start is not None else []
    if start is not None:
        check_turns(tail)
        del listed[start:]
        response = _response(tail[-1])
    elif listed and listed[-1]["role"] == "assistant":
        response = _response(listed.pop())
    if not listed:
        raise ValueError("needs a message before the last answer; add the question")

    # 2. Media of the record's own fields, which parts without a source and tags take in order.
    fields = _media_fields(record, media_root)
    waiting = {kind: iter(paths) for kind, paths in fields.items()}
    places = Counter(kind for message in listed for kind in _places(message["content"]))
    available = {kind: len(paths) for kind, paths in fields.items()}
    if places and any(available.values()) and any(places[kind] != count for kind, count in available.items()):
        raise ValueError(
            f"has messages that place {dict(places)} of its media, but it has {available}; name every medium once, or "
            "none"
        )

    # 3. Contents as parts.
    files: dict[MediaKind, list[str]] = {"image": [], "video": [], "audio": []}
    has_fields = any(available.values())
    messages = []
    for message in listed:
        _check_whole(message)
        parts = list(_parts(message["content"], waiting, files, media_root, tags=has_fields))
        messages.append({"role": message["role"], "content": parts, **_calls(message)})

    # 4. Media that nothing places come first; they may be those of the messages.
    if has_fields and not places and files != {kind: list(paths) for kind, paths in fields.items()}:
        if any(files.values()):
            raise ValueError("has messages with media of their own, and fields with others; leave out the fields")
        first = [{"type": kind} for kind, paths in fields.items() for _ in paths]
        files = {kind: list(paths) for kind, paths in fields.items()}
        asked = next((message for message in messages if message["role"] == "user"), messages[0])
        asked["content"] = [*first, *asked["content"]]
    trace = tuple(_trace_message(message, media_root, files["video"]) for message in tail)
    return Conversation(tuple(messages), response, {f"{kind}s": tuple(paths) for kind, paths in files.items()}, trace)


def _check_whole(message: Mapping[str, Any]) -> None:
    """Raises ValueError for a part of a video that a tool showed before the last question."""
    content = message["content"] if message["role"] == "tool" else ""
    parts = [] if isinstance(content, str) else content
    if any(part.get(name) is not None for part in parts for name in OF_PARTS):
        raise ValueError(
            "has a tool's answer before the last question that shows a part of a video, where videos are whole; make "
            "that answer a part of the trace, or leave its media out"
        )


def read_trace(record: Mapping[str, Any], media_root: str | None, videos: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The `trace` of a question's record as `Row.trace`; () without one.

    Args:
        record: of a question.
        media_root: see `RecordMedia`.
        videos: of the question.

    Raises:
        ValueError: it is no trace.
    """
    if not _is_chat(record.get("trace")):
        return ()
    messages = list(_messages(record, "trace"))
    check_turns(messages)
    return tuple(_trace_message(message, media_root, videos) for message in messages)


def read_tools(record: Mapping[str, Any]) -> list[Any]:
    """The JSON schemas that a record's prompt offers; none where it says nothing.

    Raises:
        ValueError: `tools` is something else than a list of them.
    """
    tools = _decoded(record.get("tools")) or []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"has tools that must be a list of JSON schemas, got {tools!r:.60}")
    return list(tools)


def _calls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"tool_calls": message["tool_calls"]} if message["tool_calls"] else {}


def _trace_message(message: Mapping[str, Any], media_root: str | None, videos: Sequence[str]) -> dict[str, Any]:
    """A message of a trace in the form of `Row.trace`."""
    if message["role"] == "assistant":
        return {"role": "assistant", "content": _response(message), **_calls(message)}
    content = message["content"]
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = KINDS.get(str(part.get("type")))
        if kind is not None:
            source = None if kind == "image" and part.get("video") is not None else _source(part)
            parts.append(read_media_part(part, kind, source, media_root, videos))
        elif isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"has a part that must be text or one of {', '.join(KINDS)}, got {str(part)[:80]}")
    return {"role": "tool", "content": parts}


def _messages(record: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The messages of a field, under the names of chat templates."""
    if name == "conversations" and record.get("messages") is not None:
        return
    listed = _decoded(record.get(name))
    if listed is None:
        return
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ValueError(f"has {name!r}, which must be a list of messages, got {type(listed).__name__} {listed!r:.60}")
    for message in listed:
        role = message.get("role") or message.get("from")
        if role not in ROLES:
            raise ValueError(f"has a message whose role must be one of {', '.join(ROLES)}, got {role!r}")
        calls = read_calls(message["tool_calls"]) if message.get("tool_calls") else []
        content = message.get("content")
        content = message.get("value") if content is None else content
        content = "" if content is None and calls else content
        is_listed = isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content)
        if not (isinstance(content, str) or is_listed):
            raise ValueError(f"has a message whose content must be text or a list of parts, got {content!r:.60}")
        thinking = message.get("reasoning_content") or message.get("reasoning")
        yield {"role": ROLES[role], "content": content, "thinking": thinking, "tool_calls": calls}


def _response(message: Mapping[str, Any]) -> str:
    """The text of an answer; thinking that stands apart comes first, in its tag."""
    content = message["content"]
    if not isinstance(content, str):
        if any(part.get("type", "text") not in TEXTS for part in content):
            raise ValueError("has media in its last answer, which must be text; leave it out")
        content = "".join(str(part.get("text") or "") for part in content)
    thinking = message["thinking"]
    text = f"<think>\n{str(thinking).strip()}\n</think>\n\n{content.lstrip()}" if thinking else content
    if not text.strip() and not message["tool_calls"]:
        raise ValueError("has an empty last answer; correct it, or leave it out")
    return text


def _media_fields(record: Mapping[str, Any], media_root: str | None) -> dict[MediaKind, tuple[str, ...]]:
    kinds: tuple[MediaKind, ...] = ("image", "video", "audio")
    fields = {}
    for kind in kinds:
        value = record.get(f"{kind}s")
        fields[kind] = RecordMedia(kind, media_root).paths(record.get(kind) if value is None else value, record)
    return fields


def _places(content: Any) -> list[MediaKind]:
    """Kinds of the media that a content takes from the record's own fields."""
    if isinstance(content, str):
        return [KINDS[tag] for tag in MEDIA_TAG.findall(content)]
    return [KINDS[part["type"]] for part in content if part.get("type") in KINDS and _source(part) is None]


def _parts(
    content: Any,
    waiting: Mapping[MediaKind, Iterator[str]],
    files: Mapping[MediaKind, list[str]],
    media_root: str | None,
    *,
    tags: bool,
) -> Iterator[Part]:
    """Texts and media of a content; the files of its media are added to `files`.

    Args:
        content: text or parts.
        waiting: files of the record's own fields that nothing took yet.
        files: of the media so far.
        media_root: see `RecordMedia`.
        tags: in texts `<image>` and the like place media.
    """
    if isinstance(content, str):
        pieces = MEDIA_TAG.split(content) if tags else [content]
        content = [{"type": piece} if index % 2 else {"text": piece} for index, piece in enumerate(pieces)]
    for part in content:
        kind = KINDS.get(str(part.get("type")))
        if kind is None:
            if part.get("type", "text") not in TEXTS or not isinstance(part.get("text"), str):
                raise ValueError(f"has a part that must be text or one of {', '.join(KINDS)}, got {str(part)[:80]}")
            if part["text"]:
                yield {"type": "text", "text": part["text"]}
            continue
        source = _source(part)
        paths = (next(waiting[kind], None),) if source is None else RecordMedia(kind, media_root).paths(source, part)
        if len(paths) != 1 or paths[0] is None:
            raise ValueError(f"has a part that must be one {kind}, got {str(part)[:80]}; name its file, or add {kind}s")
        files[kind].append(paths[0])
        yield {"type": kind}


def _source(part: Mapping[str, Any]) -> Any:
    """Where the medium of a part is; None where the part does not say."""
    value = part.get(str(part["type"]))
    if value is None:
        kind = KINDS[part["type"]]
        value = next((part[name] for name in (kind, f"{kind}_url", "path", "url", "bytes") if part.get(name)), None)
    if value is None and part.get("base64"):
        value = {"data": part["base64"]}
    if not isinstance(value, Mapping):
        return value
    if value.get("data"):
        return f"data:{KINDS[part['type']]}/{value.get('format') or 'x'};base64,{value['data']}"
    if value.get("url"):
        return value["url"]
    return value
