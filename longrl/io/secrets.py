"""Keys that are in the environment, kept out of what is written: logs, journals, tracebacks, errors."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "[a key]"
NAMES = re.compile(r"(^|_)(API_?KEYS?|KEY|TOKEN|SECRET|PASSWORD|PASSWD)(_|$)", re.IGNORECASE)
"""Names of environment variables that hold keys."""
MIN_CHARACTERS = 8
"""Shorter values are words of ordinary texts."""


def known_secrets() -> list[str]:
    """Keys in the environment, the longest first."""
    found = {value.strip() for name, value in os.environ.items() if NAMES.search(name)}
    return sorted((value for value in found if len(value) >= MIN_CHARACTERS), key=len, reverse=True)


def mask_secrets(value: Any, *more: str) -> Any:
    """A text, or lists and mappings of texts, with a mask in the place of keys.

    Args:
        value: anything; numbers stay as they are.
        more: keys that are not in the environment under a name that tells.
    """
    return _masked(value, [*more, *known_secrets()])


def _masked(value: Any, keys: list[str]) -> Any:
    if isinstance(value, str):
        for key in keys:
            value = value.replace(key, MASK)
        return value
    if isinstance(value, list):
        return [_masked(item, keys) for item in value]
    if isinstance(value, dict):
        return {_masked(name, keys): _masked(item, keys) for name, item in value.items()}
    return value


def check_no_password(url: str, option: str) -> None:
    """Raises ValueError if a url holds a password: urls are in configs, logs and reports. The url is not said."""
    authority = url.partition("//")[2].partition("/")[0]
    if "@" in authority:
        raise ValueError(f"{option} must not hold a password (https://user:password@host); leave it out of the url")
