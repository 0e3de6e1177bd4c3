r"""Tool calls in a turn, as Hermes and Qwen's chat templates write them, one behind the other.

    <tool_call>
    {"name": "crop_video", "arguments": {"start_s": 12, "end_s": 20}}
    </tool_call>

or, as Qwen3-Coder's and Qwen3.5's templates have it, in the place of the JSON

    <function=crop_video>
    <parameter=start_s>
    12
    </parameter>
    </function>

Thinking holds no calls: of a turn only what follows its last `</think>` counts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longrl.io.jsonl import parse_json
from longrl.io.tags import tagged_parts

TAG = "tool_call"
MAX_CALLS = 64
"""Calls of a turn that are read at all."""
MAX_CALL_CHARS = 20_000
"""Of one call."""
EXAMPLE = '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
_FUNCTION = re.compile(r"\s*<function=([^<>\s]{1,200})>")
_PARAMETER = re.compile(r"<(/?)parameter(?:=([^<>\s]{1,200}))?>")


@dataclass(frozen=True)
class RequestedCall:
    """A call as it was written."""

    name: str
    """"" where it cannot be read."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why it cannot be read, in words for the policy."""
    is_text: bool = False
    """True if all arguments are texts whatever their types, as in the form of Qwen3-Coder."""


def parse_tool_calls(text: str) -> list[RequestedCall]:
    """The calls of a turn in order, those that cannot be read included; none if it makes no call. In linear time.

    Arguments are plain values as JSON has them: no NaN, no half characters. They may also be a text that holds JSON.
    """
    behind = text.rpartition("</think>")[2]
    calls = []
    end = 0
    for part in tagged_parts(behind, TAG):
        end = part.end
        calls.append(_read_call(part.content))
        if len(calls) == MAX_CALLS:
            return calls
    if f"<{TAG}>" in behind[end:].lower():
        calls.append(RequestedCall("", error=f"a tool call must end with </{TAG}>, and this one does not; {_write()}"))
    return calls


def quoted(value: object, max_chars: int = 80) -> str:
    """A value for a message: its beginning, in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = " ".join(text[: 4 * max_chars].split())
    text = text if len(text) <= max_chars else text[:max_chars] + "..."
    return "`" + text.encode("utf-8", "replace").decode() + "`"


def _write() -> str:
    return f"write {EXAMPLE}"


def _read_call(content: str) -> RequestedCall:
    if len(content) > MAX_CALL_CHARS:
        problem = f"a tool call may have {MAX_CALL_CHARS} characters, got {len(content)}; ask for less"
        return RequestedCall("", error=problem)
    if _FUNCTION.match(content):
        return _read_parameters(content)
    # 1. An object with a name.
    try:
        call = parse_json(content)
    except json.JSONDecodeError as error:
        problem = f"a tool call must be JSON, got {quoted(content)} ({error.msg} at character {error.pos}); {_write()}"
        return RequestedCall("", error=problem)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        problem = f'a tool call must be a JSON object with "name" and "arguments", got {quoted(content)}; {_write()}'
        return RequestedCall("", error=problem)
    # 2. Its arguments, which some models write as a text.
    name, arguments = call["name"], call.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(json.JSONDecodeError):
            arguments = parse_json(arguments)
    if arguments is None:
        arguments = {}
    unknown = call.keys() - {"name", "arguments", "id", "type"}
    if unknown or not isinstance(arguments, dict):
        got = f"also {quoted(sorted(unknown))}" if unknown else quoted(arguments)
        problem = f'"arguments" must be a JSON object that holds all arguments by name, got {got}; {_write()}'
        return _plain(RequestedCall(name, error=problem))
    return _plain(RequestedCall(name, arguments))


def _read_parameters(content: str) -> RequestedCall:
    """A call in the form of Qwen3-Coder; a value is what stands between its tags without the line breaks there."""
    opening = _FUNCTION.match(content)
    assert opening is not None, "the caller has looked"
    name = opening[1]
    body, closes, rest = content[opening.end() :].rpartition("</function>")
    problem = None
    if not closes or rest.strip():
        problem = f"<function={name}> must end with </function>, and nothing may follow it"
    arguments: dict[str, str] = {}
    current, start = None, 0
    for match in _PARAMETER.finditer(body):
        if current is None and not match[1] and match[2]:
            current, start = match[2], match.end()
        elif current is not None and match[1]:
            if current in arguments:
                problem = problem or f"<parameter={current}> is given twice"
            arguments[current] = body[start : match.start()].removeprefix("\n").removesuffix("\n")
            current = None
    if current is not None:
        problem = problem or f"<parameter={current}> must end with </parameter>"
    if problem:
        remedy = f"write <function={name}>\n<parameter=NAME>\nVALUE\n</parameter>\n</function>"
        return _plain(RequestedCall(name, error=f"{problem}; {remedy}"))
    return _plain(RequestedCall(name, arguments, is_text=True))


def _plain(call: RequestedCall) -> RequestedCall:
    """The call, if files and tokenizers can hold what it says."""
    try:
        json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return RequestedCall("", error="a tool call holds half a character (a lone surrogate); write whole ones")
    except (ValueError, RecursionError):
        return RequestedCall(call.name, error="numbers must be finite, got NaN or Infinity; write a number")
    return call
