"""Runs a function in several processes that talk over gloo, as the ranks of a run do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longrl.testing.gloo_ranks import run_on_ranks


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """See `run_on_ranks`; with what most tests import loaded once."""
    return run_on_ranks(function, world_size, *args, preload=("longrl.modules.policy", "tests.tiny"))
