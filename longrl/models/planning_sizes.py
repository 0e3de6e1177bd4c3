"""The sizes of a model from which memory and time of a run follow, whatever its config calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longrl.models.pretrained_folder import PretrainedFolder


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """A decoder with grouped queries and a gated MLP."""

    hidden: int
    num_heads: int
    num_key_heads: int
    head_size: int
    mlp_width: int
    vocabulary: int
    num_experts: int = 0
    """MLPs of a layer of which a token uses some; 0 for one that all tokens use."""


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
            mlp_width=text.intermediate_size,
            vocabulary=text.vocab_size,
            num_experts=getattr(text, "num_experts", None) or 0,
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

    def time_tokens(self, timestamps: Sequence[float]) -> int:
        """Tokens that say when a video's temporal patches were, beside its features."""
        return 0
