"""Runs a function in several processes that talk over gloo, as the ranks of a run do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

from longrl.testing.gloo_ranks import run_on_ranks

PRELOADED = ("tests.preloaded",)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """See `run_on_ranks`."""
    return run_on_ranks(function, world_size, *args, preload=PRELOADED)


def forked_processes() -> BaseContext:
    """Processes that start as those of `run_distributed`, where a program would spawn: without seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longrl.models.qwen_vl", *PRELOADED])
    return context
