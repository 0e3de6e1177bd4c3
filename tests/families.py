"""The families of the table in docs/families.md, tiny, and the mark by which a test says which cells of it it proves.

    @proves("SP", "qwen3-vl", "qwen3-vl-moe")     a test of both
    @every("cached features", SEEING)             a test of one at a time, whose argument is its name

`python -m tests.family_table` collects the marks and writes the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from longrl.models.base import CausalFamily
from longrl.types import Prompt
from tests.tiny import (
    internvl_family,
    internvl_prompts,
    llama_family,
    mixed_prompts,
    nvila_family,
    omni_family,
    omni_prompts,
    qwen2_vl_family,
    qwen3_5_family,
    qwen3_5_text_family,
    qwen3_omni_family,
    qwen3_vl_family,
    row,
    text_family,
    vila_family,
    vl_family,
)

CLAIMS = {
    "same logits": "log-probabilities are those of transformers' own class, of VILA those of a plain computation",
    "released files": "a folder with the released names, shapes and config fields loads with none missing or left over",
    "SFT": "trains from its YAML through the command line",
    "RL": "GRPO goes on from that run's checkpoint, whose policy is its reference",
    "SP": "loss and every gradient of two ranks that share sequences are those of one plain process",
    "shared prefix": "log-probabilities and every gradient of packed groups are those of one forward per completion",
    "cached features": "features from disk are the encoder's to the last bit, and the encoder does not run",
    "vLLM": "tokens and log-probabilities are the trainer's, after every update of the weights",
    "export": "the run's folder loads in transformers (VILA's in its own layout) with the checkpoint's bits",
}
"""Columns of the table, and what a tick stands for."""


@dataclass(frozen=True)
class Tested:
    """A row of the table."""

    label: str
    """Its name in the table."""
    make: Callable[..., CausalFamily]
    """A tiny one with random weights."""
    prompts: Callable[[Any], list[Prompt]]
    """Mixed media, several videos and odd sizes where it reads media; of different lengths."""


def text_prompts(family: CausalFamily) -> list[Prompt]:
    questions = ["Which one?", "a much longer one? " * 5, "x"]
    return [family.render(row(str(i)), question) for i, question in enumerate(questions)]


FAMILIES = {
    "qwen2.5": Tested("Qwen2.5 text", functools.partial(text_family, "qwen2"), text_prompts),
    "qwen3": Tested("Qwen3 text", functools.partial(text_family, "qwen3"), text_prompts),
    "llama3": Tested("Llama 3 text", llama_family, text_prompts),
    "qwen2-vl": Tested("Qwen2-VL", qwen2_vl_family, mixed_prompts),
    "qwen2.5-vl": Tested("Qwen2.5-VL", vl_family, mixed_prompts),
    "qwen3-vl": Tested("Qwen3-VL", qwen3_vl_family, mixed_prompts),
    "qwen3-vl-moe": Tested("Qwen3-VL, experts", functools.partial(qwen3_vl_family, experts=True), mixed_prompts),
    "qwen3.5": Tested("Qwen3.5", qwen3_5_family, mixed_prompts),
    "qwen3.5-moe": Tested("Qwen3.5, experts", functools.partial(qwen3_5_family, experts=True), mixed_prompts),
    "qwen3.5-text": Tested("Qwen3.5 text", qwen3_5_text_family, text_prompts),
    "qwen2.5-omni": Tested("Qwen2.5-Omni thinker", omni_family, omni_prompts),
    "internvl3.5": Tested("InternVL3.5", internvl_family, internvl_prompts),
    "qwen3-omni": Tested("Qwen3-Omni thinker", qwen3_omni_family, omni_prompts),
    "nvila": Tested("NVILA", nvila_family, mixed_prompts),
    "longvila-r1": Tested("LongVILA-R1", functools.partial(vila_family, pool_frames="by_length"), mixed_prompts),
}
TEXT = ("qwen2.5", "qwen3", "llama3", "qwen3.5-text")
SEEING = tuple(name for name in FAMILIES if name not in TEXT)


def proves(claim: str, *names: str) -> pytest.MarkDecorator:
    """Marks a test that shows `claim` of these families."""
    assert claim in CLAIMS, claim
    assert set(names) <= FAMILIES.keys(), names
    return pytest.mark.proves(claim, *names)


def cell(claim: str | Sequence[str], name: str, *values: Any) -> Any:
    """A parameter of a test that shows claims of one family: `values`, or the family's name."""
    claims = [claim] if isinstance(claim, str) else claim
    return pytest.param(*(values or (name,)), id=name, marks=[proves(claim, name) for claim in claims])


def every(claim: str | Sequence[str], names: Iterable[str] = tuple(FAMILIES)) -> pytest.MarkDecorator:
    """Runs a test with the argument `name` for each of these families, and marks it as proof of `claim`."""
    return pytest.mark.parametrize("name", [cell(claim, name) for name in names])
