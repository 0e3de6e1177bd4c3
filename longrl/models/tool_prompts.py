"""Tools in a chat whose template knows none: how they are offered and how their answers are shown.

The words are those of Hermes, which Qwen's templates use: models that were trained with either know them. Templates
that know tools have their own (`ChatTokens.reads_tools`, `ChatTokens.has_role`).
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from longrl.models.chat_tokens import ChatTokens, Message, break_token

logger = logging.getLogger(__name__)

OFFER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
Parts = list[dict[str, str]]


def with_tools(
    chat: ChatTokens, messages: list[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], dict[str, Any]]:
    """A chat that offers tools: its messages, and what the template is told beside them.

    A template that reads tools writes them itself. Else they stand in the system message, behind what it says, or
    before the first message of the user where the template takes no system message. What they spell of special tokens
    is text.

    Args:
        chat: the template.
        messages: of a prompt.
        tools: JSON schemas; without any nothing is changed.
    """
    if not tools:
        return messages, {}
    if chat.reads_tools:
        return messages, {"tools": [_broken(chat, tool) for tool in tools]}
    offer = offer_text([_broken(chat, tool) for tool in tools])

    # 1. Behind the system message, or the one that the template would write.
    first = messages[0]
    if first["role"] in ("system", "developer"):
        return [{**first, "content": _behind(first["content"], offer)}, *messages[1:]], {}
    if chat.default_system is not None:
        return [{"role": "system", "content": _behind(chat.default_system, offer)}, *messages], {}

    # 2. Before the user's.
    content = first["content"]
    text = f"{offer}\n\n"
    content = text + content if isinstance(content, str) else [{"type": "text", "text": text}, *content]
    return [{**first, "content": content}, *messages[1:]], {}


def offer_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The words that offer tools, with their JSON schemas."""
    return OFFER.replace("{tools}", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def _behind(system: Any, offer: str) -> str:
    return f"{system}\n\n{offer}" if system else offer


def _broken(chat: ChatTokens, value: Any) -> Any:
    """A plain value whose texts spell no special tokens."""
    if isinstance(value, str):
        return chat.special.sub(break_token, value)
    if isinstance(value, Mapping):
        return {name: _broken(chat, one) for name, one in value.items()}
    return [_broken(chat, one) for one in value] if isinstance(value, list | tuple) else value


def join_answers(messages: Sequence[Message]) -> list[Message]:
    """The same with what tools answer told by the user, as lists of parts: answers of a turn are one message."""
    joined: list[Message] = []
    for is_tool, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        told = list(group)
        joined += [{"role": "user", "content": as_users([one["content"] for one in told])}] if is_tool else told
    return joined


def as_users(contents: Sequence[Parts]) -> Parts:
    """Texts and media of the message of a user that stands for tools' answers.

    Args:
        contents: texts and media of each answer.
    """
    parts: Parts = []
    for number, content in enumerate(contents):
        opening = "\n" * bool(number) + "<tool_response>\n"
        parts += [{"type": "text", "text": opening}, *content, {"type": "text", "text": "\n</tool_response>"}]
    return parts
