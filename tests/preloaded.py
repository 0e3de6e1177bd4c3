"""What a process of a test starts with: imports, and the tiny models' folders and classes, made once and inherited.

A rank would take seconds to make them, longer than most tests compute. Nothing here starts a thread, for it is forked.
"""

from __future__ import annotations

import peft  # noqa: F401

import longrl.strategies.mr_sp  # noqa: F401
import tests.modules.test_policy
import tests.runs  # noqa: F401
from tests.families import FAMILIES

for tested in FAMILIES.values():
    family = tested.make()
    family.load_processing()
    family.build()
