"""Qwen2.5-Omni's thinker in vLLM as longrl runs it: features come in, and positions with them.

vLLM 0.32's own class takes no features of sound, gives those of images and videos back in one piece, which its runner
refuses, and counts positions of interleaved sound in another way than transformers. So this is a model class of our own
beside it: every run of placeholders is an item with its rows and the positions from the run before to its end. There
are no encoders.

It is imported only by a process that is about to start vLLM, and by those that vLLM starts: its config, which they are
given, names `as_features`. The import makes the class known to the vLLM of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen2_5OmniConfig
from vllm import ModelRegistry
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder
from vllm.multimodal.processing.processor import BaseMultiModalProcessor, PromptReplacement

ARCHITECTURE = "LongRLQwen2_5OmniFeatures"
KINDS = ("image", "video", "audio")
PARTS: dict[str, Literal["values", "metadata"]] = {
    "embeds": "values", "counts": "metadata", "positions": "metadata", "reach": "metadata",
}  # fmt: skip
"""Fields of n items: [rows, D], [n] rows of each, [sum of reaches, 3] and [n] positions that each brings."""
BEYOND = 2
"""Positions that an item brings of what is behind it; only those of the last one count."""


def as_features(config: Any) -> Any:
    """VLLM's config of a released folder or of a thinker alone, naming the class below."""
    return whole_config(config, Qwen2_5OmniConfig, ARCHITECTURE)


def whole_config(config: Any, kind: Callable[..., Any], architecture: str) -> Any:
    """The config of a whole model of this kind, also of a thinker alone, that names a class of features."""
    if not hasattr(config, "thinker_config"):
        config = kind(thinker_config=config.to_dict())
    config.architectures = [architecture]
    return config


def media_fields(data: Mapping[str, Any]) -> dict[str, MultiModalFieldConfig]:
    """How each tensor is cut into items."""
    configs = {}
    for kind in KINDS:
        if f"{kind}_counts" in data:
            counts, reach = data[f"{kind}_counts"], data[f"{kind}_reach"]
            configs[f"{kind}_embeds"] = MultiModalFieldConfig.flat_from_sizes(kind, counts)
            configs[f"{kind}_counts"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            configs[f"{kind}_positions"] = MultiModalFieldConfig.flat_from_sizes(kind, reach, keep_on_cpu=True)
            configs[f"{kind}_reach"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
    return configs


class FeatureParser(MultiModalDataParser):
    """Takes features alone: neither pixels nor samples."""

    embedding_fields: Mapping[str, Mapping[str, Literal["values", "metadata"]]] = {
        kind: {f"{kind}_{part}": role for part, role in PARTS.items()} for kind in KINDS
    }

    def _parse_image_data(self, data: Any) -> Any:
        return self._features(data, "image")

    def _parse_video_data(self, data: Any) -> Any:
        return self._features(data, "video")

    def _parse_audio_data(self, data: Any) -> Any:
        return self._features(data, "audio")

    def _features(self, data: Any, kind: str) -> Any:
        required, optional = self.embedding_field_sets(kind)
        return DictEmbeddingItems(data, kind, required, media_fields, optional)


class FeatureInfo(Qwen2_5OmniThinkerProcessingInfo):
    """The facts that vLLM asks of a model with media."""

    def get_data_parser(self) -> FeatureParser:
        """See `FeatureParser`."""
        return FeatureParser(expected_hidden_size=self._get_expected_hidden_size())

    def feature_size(self) -> int:
        """Columns of an item's rows."""
        return int(self.get_hf_config().text_config.hidden_size)


class FeatureDummies(BaseDummyInputsBuilder[FeatureInfo]):
    """Inputs that vLLM measures memory with: items of one row."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Placeholders."""
        processor = self.info.get_hf_processor()
        return "".join(getattr(processor, f"{kind}_token") * count for kind, count in mm_counts.items() if count)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """Zeros."""
        width = self.info.feature_size()
        return {
            kind: {
                f"{kind}_embeds": torch.zeros(count, width), f"{kind}_counts": torch.ones(count, dtype=torch.int64),
                f"{kind}_positions": torch.zeros(count, 3, dtype=torch.int64),
                f"{kind}_reach": torch.ones(count, dtype=torch.int64),
            }
            for kind, count in mm_counts.items() if count
        }  # fmt: skip


class FeatureProcessor(BaseMultiModalProcessor[FeatureInfo]):
    """Puts as many placeholders as an item has rows in the place of one."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        return media_fields(hf_inputs)

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        config, data = self.info.get_hf_config(), out_mm_kwargs.get_data()
        tokens = {kind: getattr(config, f"{kind}_token_id") for kind in KINDS if kind in mm_items}

        def rows(item: int, kind: str) -> list[int]:
            return [tokens[kind]] * int(data[f"{kind}_counts"][item])

        return [
            PromptReplacement(modality=kind, target=[token], replacement=partial(rows, kind=kind))
            for kind, token in tokens.items()
        ]


class TakesFeatures:
    """What a thinker's class of vLLM does otherwise when features and positions come in."""

    language_model: Any

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """[n, D] rows of every item."""
        items: list[Tensor] = []
        for kind in KINDS:
            if f"{kind}_embeds" in kwargs:
                rows = kwargs[f"{kind}_embeds"].type(next(self.language_model.parameters()).dtype)
                items += rows.split(kwargs[f"{kind}_counts"].flatten().tolist())
        return items

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """[3, T] positions: those that the items bring, and text behind them; and what to add to T."""
        items = sorted(mm_features, key=lambda item: item.mm_position.offset)
        brought = [item.data[f"{item.modality}_positions"].data.T for item in items]
        parts = [part[:, :-BEYOND] for part in brought] + [part[:, -BEYOND:] for part in brought[-1:]]
        known = torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.int64)
        start = int(known[:, -1].max()) + 1 if parts else 0
        rest = torch.arange(start, start + len(input_tokens) - known.shape[1]).expand(3, -1)
        positions = torch.cat([known, rest], dim=1)
        return positions, int(positions.max()) + 1 - len(input_tokens)


@MULTIMODAL_REGISTRY.register_processor(FeatureProcessor, info=FeatureInfo, dummy_inputs=FeatureDummies)
class OmniFeatures(TakesFeatures, Qwen2_5OmniThinkerForConditionalGeneration):
    """The thinker's text stack on features and positions that come in."""


ModelRegistry.register_model(ARCHITECTURE, OmniFeatures)
