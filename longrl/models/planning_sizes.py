"""The sizes of a model from which memory and time of a run follow, whatever its config calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longrl.models.pretrained_folder import PretrainedFolder
from longrl.packing.delta_kernels import CHUNK_ROWS
from longrl.types import Media


@dataclass(frozen=True, kw_only=True)
class DeltaSizes:
    """Gated delta nets in the place of attention in some layers (longrl/packing/delta_net.py).

    Letters: V value heads, E size of a key, F of a value, C channels of the convolution.
    """

    num_layers: int
    """Layers that have one."""
    num_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    taps: int
    """Rows that the convolution sees."""

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.num_key_heads * self.key_size + self.num_heads * self.value_size

    def state_bytes(self, value_bytes: int) -> int:
        """What a sequence keeps of its past in a layer: 4 V E F, and rows before the convolution, (taps - 1) C b."""
        state = 4 * self.num_heads * self.key_size * self.value_size  # always float32
        return state + (self.taps - 1) * self.channels * value_bytes

    def rule_flops(self, chunk_rows: int = CHUNK_ROWS) -> float:
        """Operations of the rule per row and layer, in chunks of c rows: V (c (5 E + 3 F) + 6 E F).

        Of a chunk keys by keys and queries by keys, 4 c E, the triangular system, c (E + F), scores by values, 2 c F;
        state by keys and queries, and what is written, 6 E F.
        """
        within = chunk_rows * (5 * self.key_size + 3 * self.value_size)
        return float(self.num_heads * (within + 6 * self.key_size * self.value_size))


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """A decoder with grouped queries and a gated MLP."""

    hidden: int
    num_heads: int
    num_key_heads: int
    head_size: int
    mlp_width: int
    """Of all MLPs of a layer that a token goes through."""
    vocabulary: int
    num_experts: int = 0
    """MLPs of a layer of which a token uses some; 0 for one that all tokens use."""
    experts_per_token: int = 0
    """Those that it uses."""
    delta_nets: DeltaSizes | None = None
    """None if all layers attend."""
    gated_attention: bool = False
    """True if attention's output is multiplied by gates that stand beside the queries."""


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """A vision transformer, windowed or not."""

    width: int
    mlp_width: int
    num_layers: int
    num_full_layers: int
    """Layers that attend over a whole temporal patch instead of a window."""
    window_patches: int
    patch_values: int
    """Numbers of a patch of pixels."""
    merge: float
    """Patches of one feature."""
    frames_per_patch: int = 1
    """Frames that the encoder itself reads as one; a family may average more of them."""


@dataclass(frozen=True, kw_only=True)
class AudioSizes:
    """A transformer over a sound."""

    width: int
    mlp_width: int
    states_per_token: int
    """Of its layers; Qwen2.5-Omni averages two of them."""
    convolved_values: int
    """Numbers that the convolutions before the layers hold at their widest, per token."""


class HasPlanningSizes(PretrainedFolder):
    """How large is the model? `longrl plan` asks before a weight is read."""

    def planning_sizes(self) -> tuple[TextSizes, VisionSizes | None]:
        """Sizes of the text stack and of the vision encoder, None without one."""
        text = self.config.get_text_config()
        sizes = TextSizes(
            hidden=text.hidden_size,
            num_heads=text.num_attention_heads,
            num_key_heads=text.num_key_value_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp_width=_mlp_width(text),
            vocabulary=text.vocab_size,
            num_experts=getattr(text, "num_experts", None) or 0,
            experts_per_token=getattr(text, "num_experts_per_tok", None) or 0,
            delta_nets=_delta_sizes(text),
            gated_attention=hasattr(text, "linear_num_value_heads"),
        )
        return sizes, None

    def audio_sizes(self) -> AudioSizes | None:
        """Sizes of the audio encoder, None without one."""
        return None

    def sound_tokens(self, seconds: float) -> int:
        """Tokens of the track of a video of so many seconds, if it is shown with its sound."""
        return 0

    def sound_tokens_per_encode(self) -> int | None:
        """Tokens of a sound that are encoded at once; None for all."""
        return None

    def encoded_patches(self, media: Media) -> int:
        """Patches that the encoder reads of an image or video; those that pooling makes one feature of count each."""
        return math.prod(media.grid_thw)

    def time_tokens(self, timestamps: Sequence[float]) -> int:
        """Tokens that say when a video's temporal patches were, beside its features."""
        return 0


def is_expert(name: str) -> bool:
    """True for the name of a weight of experts, of which a token uses some."""
    return ".experts." in name


def _mlp_width(text: Any) -> int:
    """Width of the MLPs that a token goes through: one, or some experts and perhaps one that all tokens share."""
    if not getattr(text, "num_experts", None):
        return text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return text.num_experts_per_tok * text.moe_intermediate_size + shared


def _delta_sizes(text: Any) -> DeltaSizes | None:
    """Of transformers' names for hybrid models (Qwen3.5, Qwen3-Next)."""
    if not hasattr(text, "linear_num_value_heads"):
        return None
    return DeltaSizes(
        num_layers=text.layer_types.count("linear_attention"),
        num_heads=text.linear_num_value_heads,
        num_key_heads=text.linear_num_key_heads,
        key_size=text.linear_key_head_dim,
        value_size=text.linear_value_head_dim,
        taps=text.linear_conv_kernel_dim,
    )
