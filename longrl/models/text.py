"""The text-only family: Qwen2, Qwen2.5 and Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, arange, nn
from typing_extensions import override

from longrl.models.base import OWN_WEIGHTS, CausalFamily
from longrl.types import Frames, Media

MODEL_TYPES = ("qwen2", "qwen3")
"""Of a config; Qwen2.5's is qwen2."""


class TextFamily(CausalFamily):
    """A Qwen2, Qwen2.5 or Qwen3 language model without sliding windows.

    Others need hooks of their own: they scale or cap logits, add a bias to them, or name their layers' kinds otherwise.

    Example:
        `TextFamily(model="Qwen/Qwen3-1.7B", dtype="bfloat16", chat_template_kwargs={"enable_thinking": False})`
    """

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        found = self.config.model_type
        if found not in MODEL_TYPES:
            raise ValueError(
                f"{type(self).__name__} reads models of type {' and '.join(MODEL_TYPES)}, but model.family's "
                f"model={self.model_path!r} is a {found}; name a Qwen2, Qwen2.5 or Qwen3 text model, or write a family"
            )
        return super().build(weights)

    @override
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @override
    def backbone(self, model: nn.Module) -> nn.Module:
        return model.model

    @override
    def positions(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        return arange(len(input_ids))[None]

    @override
    def patch(self, frames: Frames) -> Media:
        raise ValueError(
            f"{type(self).__name__} reads text only, but the row has a {frames.kind}; use a vision family, or rows "
            "without media"
        )

    @override
    def placeholder(self, media: Media) -> list[int]:
        raise AssertionError("a text model has no media")
