"""Qwen3-VL (arXiv:2511.21631), dense and mixture of experts: timestamps as text, interleaved M-RoPE, DeepStack.

Three things differ from Qwen2.5-VL. Every temporal patch of a video is a picture of its own behind its time in words,
so positions know nothing of seconds. The encoder attends over whole temporal patches and also gives features from some
of its layers: they lie behind the ordinary ones, [N, D * (1 + K)], and are added to the hidden states behind the text
stack's first K layers (DeepStack, arXiv:2406.04334). And the pixel budget counts all frames of a video.

The load-balancing loss of a mixture's router is not part of any objective here; its load is logged, and the engine's
choice can be replayed (`longrl/models/expert_routing.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from longrl.models.base import CausalFamily
from longrl.models.expert_routing import num_experts
from longrl.models.mrope import PositionBlock, place_blocks
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import Media, MediaKind

FACTOR = 32 * 32
"""Pixels of a feature: patches of 16 x 16, merged 2 x 2."""


class Qwen3VLFamily(Qwen2_5_VLFamily):
    """Qwen3-VL of any size, dense or mixture of experts, Instruct or Thinking.

    Args:
        model: folder or hub id.
        min_pixels: a frame or image is enlarged to at least this many pixels.
        max_pixels: a frame or image is shrunk to at most this many pixels.
        max_video_pixels: budget over all frames of a video; see `Qwen2_5_VLFamily`, also for `max_video_tokens`.
        outer_vision_marks: keep the chat template's vision start and end around all temporal patches of a video, as
            transformers does since 5.10. In the code the models were released with (transformers 4.57) the patches
            replace them.
        kwargs: see `Qwen2_5_VLFamily`.

    Example:
        `Qwen3VLFamily(model="Qwen/Qwen3-VL-8B-Instruct", dtype="bfloat16", max_pixels=128 * 32 * 32)`
    """

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    answer_options = ("outer_vision_marks",)

    def __init__(
        self,
        model: str,
        min_pixels: int = 4 * FACTOR,
        max_pixels: int = 128 * FACTOR,
        max_video_pixels: int = 115_200 * FACTOR,
        outer_vision_marks: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, min_pixels, max_pixels, max_video_pixels, **kwargs)
        self.outer_vision_marks = outer_vision_marks

    # -- prompts -------------------------------------------------------------------------------------------------

    @override
    def tokenize_chat(self, chat: str, media: Sequence[Media]) -> list[int]:
        ids = super().tokenize_chat(chat, media)
        return ids if self.outer_vision_marks else _without_marks(ids, self.config)

    @override
    def placeholder_ids(self, media: Media) -> list[int]:
        """For a video `<1.5 seconds>`, vision start, features, vision end; again for every temporal patch.

        A timestamp is tokenized on its own, as in vLLM. transformers' processor reads the text as a whole, which is the
        same unless words stand right before a video without marks around it: their end may join its `<`.
        """
        if media.kind == "image":
            return super().placeholder_ids(media)
        start, token, end = (
            self.config.vision_start_token_id, self.config.video_token_id, self.config.vision_end_token_id,
        )  # fmt: skip
        times = self.tokenizer([f"<{time:.1f} seconds>" for time in media.timestamps], add_special_tokens=False)
        pairs = zip(times["input_ids"], self.rows_of_patches(media), strict=True)
        return list(itertools.chain.from_iterable([*time, start, *[token] * rows, end] for time, rows in pairs))

    @override
    def time_tokens(self, timestamps: Sequence[float]) -> int:
        """Number by Qwen's tokenizer, which has a token for every digit, `<`, `.`, ` seconds`, `>`; and two marks."""
        return sum(len(f"{time:.1f}") + 5 for time in timestamps)

    @override
    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        blocks = []
        for item in media:
            whole = self.position_block(item, step=0)  # patch after patch, all at time 0
            blocks += [PositionBlock(grid, whole.reach) for grid in whole.grid.split(self.rows_of_patches(item), 1)]
        return place_blocks(input_ids, blocks, set(self.media_token_ids().values()))

    @override
    def frame_size(self, num_frames: int, height: int, width: int, kind: MediaKind = "video") -> tuple[int, int]:
        if kind == "image":
            return super().frame_size(num_frames, height, width, kind)
        processor = self.processor.video_processor
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        least, most = self.video_budget(num_frames)
        return smart_resize(
            max(num_frames, self.frames_per_patch),  # it knows no shorter video; patching repeats the last frame
            height=height,
            width=width,
            temporal_factor=self.frames_per_patch,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=least,
            max_pixels=most,
        )

    def video_budget(self, num_frames: int) -> tuple[int, int]:
        """Least and most pixels of all frames of a video together: the `size` of transformers' video processor."""
        frames = max(num_frames, self.frames_per_patch)
        least = self.min_pixels * frames
        return least, max(least, min(self.max_pixels * frames, self.video_pixels()))

    # -- files ---------------------------------------------------------------------------------------------------

    @override
    def save_weights(self, model: Any, folder: str | Path) -> None:
        """In the released layout: transformers 5.19 reads experts either way and writes them in its own."""
        released = {name: self.engine_tensor(name, weight).contiguous() for name, weight in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=released, save_original_format=False)

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        refuse_experts_on_a_cpu(self)
        if self.merging is not None:
            return self.merging_options()
        # vLLM adds features to deeper layers only beside an encoder of its own: it is built, but never measured or run.
        limits = dict.fromkeys(("image", "video"), 64)
        return {**super().engine_options(), "limit_mm_per_prompt": limits, "skip_mm_profiling": True}

    @override
    def engine_tensor(self, name: str, weight: Tensor) -> Tensor:
        """Released files hold all experts' weights as [experts, in, out], transformers as [experts, out, in]."""
        return weight.transpose(1, 2) if ".mlp.experts." in name else weight

    @override
    def engine_times(self, videos: Sequence[Media]) -> dict[str, Any]:
        return {"timestamps": [torch.tensor(item.timestamps, dtype=torch.float64) for item in videos]}


def refuse_experts_on_a_cpu(family: CausalFamily) -> None:
    """Raises ValueError if vLLM would run a mixture of experts on a CPU."""
    experts = num_experts(family)
    if experts and not torch.cuda.is_available():  # seen in 0.32: experts are repacked for its kernel once only
        raise ValueError(
            f"vLLM on a CPU goes wrong when a mixture of experts gets new weights, and {family.model_path!r} has "
            f"{experts} experts; use engine: longrl.engines.hf.HFEngine"
        )


def _without_marks(ids: list[int], config: Any) -> list[int]:
    """Token ids with the vision start and end next to every video placeholder left out."""
    kept: list[int] = []
    for index, token in enumerate(ids):
        opens = token == config.vision_start_token_id and ids[index + 1 : index + 2] == [config.video_token_id]
        closes = token == config.vision_end_token_id and index > 0 and ids[index - 1] == config.video_token_id
        if not opens and not closes:
            kept.append(token)
    return kept
