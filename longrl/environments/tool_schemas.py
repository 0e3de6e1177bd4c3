"""Tools are methods: their JSON schemas from type hints and docstrings, and arguments checked by these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from longrl.environments.tool_calls import quoted
from longrl.io.jsonl import parse_json

MAX_ARGUMENT_CHARS = 4000
MAX_ITEMS = 1000
"""Of a list."""
_NAMES = {
    "string": "a text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}


class ToolError(ValueError):
    """Why a tool does not answer a call, in words for the policy: the rule, the value and the remedy."""


def tool_schema(method: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a tool as chat templates take it: `{"type": "function", "function": {...}}`.

    Args:
        method: with type hints, and a docstring that has an `Args:` section with every parameter.

    Raises:
        ValueError: one of them is missing, or a type is none that JSON has.
    """
    from transformers.utils import get_json_schema

    name = getattr(method, "__qualname__", repr(method))
    try:
        schema = get_json_schema(method)
    except Exception as error:  # transformers has errors of its own for each
        raise ValueError(
            f"a tool needs type hints and a docstring that describes every parameter under `Args:`, and {name} "
            f"lacks something: {error}"
        ) from error
    schema["function"].pop("return", None)  # templates write all that is there, and answers speak for themselves
    return schema


def checked_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any], is_text: bool = False) -> dict[str, Any]:
    """Arguments of a call as the tool takes them.

    Args:
        schema: of the tool.
        arguments: plain values.
        is_text: all values are texts; those of other types are read as JSON.

    Raises:
        ToolError: one is missing, unknown, or of another type.
    """
    function = schema["function"]
    parameters = function["parameters"]
    known = parameters.get("properties", {})
    form = f"{function['name']}({', '.join(known)})"
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ToolError(f"{form} takes no {quoted(unknown[0])}; leave it out")
    missing = [name for name in parameters.get("required", ()) if name not in arguments]
    if missing:
        raise ToolError(f"{form} needs {quoted(missing[0])}; add it to the arguments")
    checked = {}
    for name, value in arguments.items():
        if is_text and known[name].get("type") != "string":
            value = _read_text(value)
        checked[name] = _checked(f"`{name}` of {form}", known[name], value)
    return checked


def _read_text(value: str) -> Any:
    """A value that is written as text; itself where it is no JSON, which the check of its type tells."""
    try:
        return parse_json(value)
    except json.JSONDecodeError:
        return value


def _checked(what: str, schema: Mapping[str, Any], value: Any) -> Any:
    """A value of the schema's type.

    Raises:
        ToolError: it has another.
    """
    # 1. None, and types that need no look inside.
    kind = schema.get("type")
    if value is None and (schema.get("nullable") or kind == "null"):
        return None
    if isinstance(kind, list) or kind not in _NAMES:  # a union, or anything
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "string": isinstance(value, str),
        "number": is_number,
        "integer": is_number and value == _floor(value),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    if not fits[kind]:
        raise ToolError(f"{what} must be {_NAMES[kind]}, got {quoted(value)}; correct it")
    # 2. Sizes.
    if kind in ("number", "integer"):
        if not abs(value) < 1e15:
            raise ToolError(f"{what} must be below 1e15, got {quoted(value)}; correct it")
        return int(value) if kind == "integer" else float(value)
    if kind == "string" and len(value) > MAX_ARGUMENT_CHARS:
        raise ToolError(f"{what} may have {MAX_ARGUMENT_CHARS} characters, got {len(value)}; shorten it")
    if "enum" in schema and value not in schema["enum"]:
        raise ToolError(f"{what} must be one of {quoted(schema['enum'])}, got {quoted(value)}; correct it")
    if kind == "array":
        if len(value) > MAX_ITEMS:
            raise ToolError(f"{what} may have {MAX_ITEMS} items, got {len(value)}; ask for fewer")
        return [_checked(f"an item of {what}", schema.get("items", {}), item) for item in value]
    return value


def _floor(value: float) -> float:
    if isinstance(value, int):  # it may be too large for a float
        return value
    return math.floor(value) if math.isfinite(value) else math.nan
