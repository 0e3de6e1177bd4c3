"""Qwen2-VL, 2.5-VL and 3-VL in vLLM on features that bring their positions, for `max_kept_tokens`.

vLLM 0.32's own classes count positions by a video's grid, in which every token is there. These take items and
processing of `longrl.models.qwen_omni_vllm`: every run of placeholders is an item with its rows and positions. There
are no encoders. They have answered on a CPU; on a GPU they have not been run.

It is imported only by a process that is about to start vLLM, and by those that vLLM starts: its config, which they are
given, names `as_features`. The import makes the classes known to the vLLM of a process.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessingInfo
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from longrl.models.qwen_omni_vllm import FeatureDummies, FeatureParser, FeatureProcessor, TakesFeatures

PREFIX = "LongRLFeatures_"
"""Of the architectures' names, before the model type."""


def as_features(config: Any) -> Any:
    """VLLM's config of a released folder, naming the class below for its model type."""
    config.architectures = [PREFIX + config.model_type]
    return config


class GivesFeatureFacts:
    """The facts that vLLM asks of a model with media, where only features come in."""

    get_hf_config: Any

    def get_data_parser(self) -> FeatureParser:
        """See `FeatureParser`."""
        return FeatureParser(expected_hidden_size=self.feature_size())

    def feature_size(self) -> int:
        """Columns of an item's rows, those of all levels beside one another."""
        config = self.get_hf_config()
        levels = getattr(config.vision_config, "deepstack_visual_indexes", ())
        return int(config.text_config.hidden_size * (1 + len(levels)))


class Qwen2VLInfo(GivesFeatureFacts, Qwen2VLProcessingInfo):
    """Of Qwen2-VL."""


class Qwen2_5_VLInfo(GivesFeatureFacts, Qwen2_5_VLProcessingInfo):
    """Of Qwen2.5-VL."""


class Qwen3VLInfo(GivesFeatureFacts, Qwen3VLProcessingInfo):
    """Of Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(FeatureProcessor, info=Qwen2VLInfo, dummy_inputs=FeatureDummies)
class Qwen2VLFeatures(TakesFeatures, Qwen2VLForConditionalGeneration):
    """Qwen2-VL's text stack on features and positions that come in."""


@MULTIMODAL_REGISTRY.register_processor(FeatureProcessor, info=Qwen2_5_VLInfo, dummy_inputs=FeatureDummies)
class Qwen2_5_VLFeatures(TakesFeatures, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL's text stack on features and positions that come in."""


@MULTIMODAL_REGISTRY.register_processor(FeatureProcessor, info=Qwen3VLInfo, dummy_inputs=FeatureDummies)
class Qwen3VLFeatures(TakesFeatures, Qwen3VLForConditionalGeneration):
    """Qwen3-VL's text stack on features and positions that come in, and on its levels for deeper layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # What the class has beside an encoder: rows of every level, from the embeddings to the layers.
        self.use_deepstack = True
        self.deepstack_num_level = len(self.config.vision_config.deepstack_visual_indexes)
        self.multiscale_dim = self.visual_dim * self.deepstack_num_level
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        width = self.config.text_config.hidden_size
        self.deepstack_input_embeds = [torch.zeros(num_tokens, width) for _ in range(self.deepstack_num_level)]
        self.deepstack_input_embeds_num_tokens = 0


ModelRegistry.register_model(f"{PREFIX}qwen2_vl", Qwen2VLFeatures)
ModelRegistry.register_model(f"{PREFIX}qwen2_5_vl", Qwen2_5_VLFeatures)
ModelRegistry.register_model(f"{PREFIX}qwen3_vl", Qwen3VLFeatures)
