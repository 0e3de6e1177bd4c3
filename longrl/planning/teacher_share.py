"""What a teacher takes of the devices, in numbers that formulas read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """A teacher whose weights are on the trainer's devices."""

    text_params: int
    encoder_params: int
    root_params: int
    hidden: int
    weight_bytes: int
    offload: bool = False
    """Its shards wait in host memory."""
    feature_cache_bytes: int = 0
