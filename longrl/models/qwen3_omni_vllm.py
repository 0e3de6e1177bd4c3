"""Qwen3-Omni's thinker in vLLM as longrl runs it: features come in, and positions with them.

As `longrl.models.qwen_omni_vllm`, whose items and processing it takes. An item's rows have further columns for the text
stack's first layers (DeepStack), which vLLM 0.32's class only takes beside a vision encoder of its own, and sorts
by media kinds; here they lie where their rows do.

The class has answered on a CPU with the weights it was started with. On a GPU, and with weights that a trainer sends,
it has not been run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3OmniMoeConfig
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from longrl.models.qwen_omni_vllm import FeatureDummies, FeatureParser, FeatureProcessor, TakesFeatures, whole_config

ARCHITECTURE = "LongRLQwen3OmniFeatures"


def as_features(config: Any) -> Any:
    """VLLM's config of a released folder or of a thinker alone, naming the class below."""
    return whole_config(config, Qwen3OmniMoeConfig, ARCHITECTURE)


class FeatureInfo(Qwen3OmniMoeThinkerProcessingInfo):
    """The facts that vLLM asks of a model with media."""

    def get_data_parser(self) -> FeatureParser:
        """See `FeatureParser`."""
        return FeatureParser(expected_hidden_size=self.feature_size())

    def feature_size(self) -> int:
        """Columns of an item's rows, those of all levels beside one another."""
        config = self.get_hf_config()
        return int(config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes)))


@MULTIMODAL_REGISTRY.register_processor(FeatureProcessor, info=FeatureInfo, dummy_inputs=FeatureDummies)
class OmniFeatures(TakesFeatures, Qwen3OmniMoeThinkerForConditionalGeneration):
    """The thinker's text stack on features and positions that come in."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # What the class has beside an encoder: rows of every level, from the embeddings to the layers.
        self.deepstack_num_level = len(self.config.vision_config.deepstack_visual_indexes)
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        width = self.config.text_config.hidden_size
        self.deepstack_input_embeds = [torch.zeros(num_tokens, width) for _ in range(self.deepstack_num_level)]
        self.deepstack_input_embeds_num_tokens = 0

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """[T, D] token embeddings, with the items' first columns in place of placeholders; the others are kept."""
        embeds = self._embed_text_input_ids(input_ids, self.language_model.embed_input_ids, is_multimodal=is_multimodal)
        if not multimodal_embeddings:
            return embeds
        assert is_multimodal is not None
        here = is_multimodal.to(embeds.device)
        rows = torch.cat(list(multimodal_embeddings)).to(embeds)
        first, *levels = rows.split(embeds.shape[1], dim=1)
        embeds[here] = first
        deeper = embeds.new_zeros(self.deepstack_num_level, *embeds.shape)
        deeper[:, here] = torch.stack(levels)
        self._set_deepstack_input_embeds(deeper)
        return embeds


ModelRegistry.register_model(ARCHITECTURE, OmniFeatures)
