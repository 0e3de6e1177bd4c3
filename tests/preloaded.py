"""What a process of a test starts with: imports, and the tiny models' folders and classes, made once and inherited.

A rank would take seconds to make them, longer than most tests compute. Nothing here starts a thread, for it is forked.
"""

from __future__ import annotations

import contextlib
import gc

import peft  # noqa: F401

import longrl.strategies.mr_sp  # noqa: F401
import tests.modules.test_policy
import tests.runs  # noqa: F401
from tests.families import FAMILIES

with contextlib.suppress(ImportError):  # an extra
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

for tested in FAMILIES.values():
    family = tested.make()
    family.load_processing()
    family.build()

# Ranks keep all of it: a garbage collector that looks through it would copy the pages they share, and find nothing.
gc.freeze()
gc.set_threshold(10_000, 10, 10)  # as tests/conftest.py
