"""Text-only families: Qwen2.5, Qwen3 and any transformers causal language model without sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, arange, nn
from typing_extensions import override

from longrl.models.base import CausalFamily
from longrl.types import Frames, Media


class TextFamily(CausalFamily):
    """A causal language model.

    Example:
        `TextFamily(model="Qwen/Qwen3-1.7B", dtype="bfloat16", chat_template_kwargs={"enable_thinking": False})`
    """

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
