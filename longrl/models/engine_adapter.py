"""The part of a family that a rollout engine with a model of its own, as vLLM, needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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

    def as_read(
        self, prompts: Sequence[Prompt], features: Mapping[str, Tensor]
    ) -> tuple[Sequence[Prompt], Mapping[str, Tensor]]:
        """Prompts at the positions, and features with the columns, that the text stack reads; mostly as they are."""
        return prompts, features

    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """A prompt as vLLM takes it."""
        return {"prompt_token_ids": prompt.input_ids.tolist()}

    def _request_with_embeddings(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """A prompt for a text model with plain positions: media rows as embeddings, text as ids that vLLM looks up.

        Text is looked up in vLLM's own weights. Its prefix cache is safe: it hashes a block's token ids and its
        embeddings.
        """
        if not prompt.media:
            return {"prompt_token_ids": prompt.input_ids.tolist()}
        media_tokens = torch.tensor(list(self.media_token_ids().values()))
        is_media = torch.isin(prompt.input_ids, media_tokens)  # [T]
        rows = torch.cat([features[item.key] for item in prompt.media]).cpu().to(getattr(torch, self.dtype))
        embeds = rows.new_zeros(len(is_media), rows.shape[1])
        embeds[is_media] = rows
        return {
            "prompt_embeds": embeds,
            "prompt_token_ids": prompt.input_ids.where(~is_media, 0).tolist(),
            "prompt_is_token_ids": (~is_media).tolist(),
        }
