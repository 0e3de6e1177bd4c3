"""Tiny pipelines and runs that the tests of flow models share."""

from __future__ import annotations

import functools
import tempfile

from longrl.models.sd3 import SD3Family
from longrl.models.tiny_flow import tiny_sd3, tiny_wan
from longrl.models.wan import WanFamily
from longrl.types import Row


@functools.cache
def sd3_folder() -> str:
    return str(tiny_sd3(tempfile.mkdtemp(prefix="longrl-sd3-")))


@functools.cache
def wan_folder(num_heads: int = 2) -> str:
    return str(tiny_wan(tempfile.mkdtemp(prefix="longrl-wan-"), num_heads=num_heads))


def sd3_family(**kwargs: object) -> SD3Family:
    """Pictures of 16 x 16: latents [4, 8, 8]."""
    return SD3Family(sd3_folder(), **{"height": 16, "width": 16, "max_text_tokens": 8, **kwargs})


def wan_family(num_heads: int = 2, **kwargs: object) -> WanFamily:
    """Videos of 5 frames of 32 x 48: latents [4, 2, 4, 6], 12 tokens."""
    defaults = {"height": 32, "width": 48, "num_frames": 5, "max_text_tokens": 8}
    return WanFamily(wan_folder(num_heads), **{**defaults, **kwargs})


FAMILIES = {"sd3": sd3_family, "wan": wan_family}


def rows(*texts: str) -> list[Row]:
    return [Row(id=str(index), problem=text, answer="") for index, text in enumerate(texts)]
