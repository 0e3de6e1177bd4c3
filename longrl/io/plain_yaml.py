"""YAML from files of others: read as plain values, and refused before it costs the process its memory or its stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

MAX_DEPTH = 100
"""Levels of lists and mappings in each other. PyYAML's C part crashes the process at some ten thousand."""
MAX_VALUES = 1_000_000
"""Values of a text once every alias stands for its anchor: ten lines can mean billions."""
MAX_CONFIG_CHARACTERS = 1 << 20
"""Of a config, or of a value in one."""
_SHORT = 100
"""No text of so few characters is nested too deeply, and most values of a command line are shorter."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """The values of a YAML text.

    Args:
        text: of any content.
        load: reads a text that is known to be harmless.

    Raises:
        yaml.YAMLError: it is no YAML, nested too deeply, or means too many values.
    """
    if len(text) > _SHORT or "*" in text:
        check_yaml(text)
    try:
        return load(text)
    except (RecursionError, ValueError, TypeError, LookupError, OverflowError, AttributeError) as error:
        # Numbers of too many digits, dates of no calendar, keys that jsonargparse does not expect.
        raise yaml.YAMLError(f"a value that cannot be read ({type(error).__name__}: {error})") from error


def check_yaml(text: str) -> None:
    """Goes through a YAML text without building what it holds.

    Raises:
        yaml.YAMLError: it is no YAML, nested too deeply, or means too many values.
    """
    sizes: dict[str, int] = {}
    open_parts: list[tuple[str | None, int]] = []
    total = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                open_parts.append((event.anchor, total))
                if len(open_parts) > MAX_DEPTH:
                    raise yaml.YAMLError(f"lists and mappings in each other, more than {MAX_DEPTH} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_parts.pop()
                if anchor is not None:
                    sizes[anchor] = total - before
            elif isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _ in open_parts):
                    raise yaml.YAMLError(f"the alias *{event.anchor} within what it stands for")
                total += sizes.get(event.anchor, 1)
            total += 1
            if total > MAX_VALUES:
                raise yaml.YAMLError(f"more than {MAX_VALUES} values once its aliases are put in")
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(f"text that cannot be read ({type(error).__name__}: {error})") from error
