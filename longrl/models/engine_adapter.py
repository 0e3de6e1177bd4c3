"""The part of a family that a rollout engine with a model of its own, as vLLM, needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from longrl.models.reading import RendersPrompts
from longrl.types import Prompt


class EngineAdapter(RendersPrompts):
    """How do the trainer's weights and prompts look to an engine? By default as in the files transformers writes."""

    media_enter_whole: ClassVar[bool] = False
    """True if vLLM takes a media item as one piece into its encoder cache, whose size bounds it."""

    def engine_options(self) -> dict[str, Any]:
        """Options of vLLM for this model, beside its folder."""
        return {}

    def engine_weight(self, name: str) -> str | None:
        """The name that vLLM knows a weight of the trainer's `state_dict` by; None for what it never computes with."""
        return name

    def engine_tensor(self, name: str, weight: Tensor) -> Tensor:
        """The weight `name` laid out as vLLM reads it: as in the files that the model was released with."""
        return weight

    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """A prompt as vLLM takes it."""
        return {"prompt_token_ids": prompt.input_ids.tolist()}
