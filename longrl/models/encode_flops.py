"""Operations of media encoders: what a video, an image or a sound costs before its features enter the text stack.

Letters: Q parameters of all encoders that see, X their width, n patches. A product with Q parameters is 2 Q operations
per patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longrl.models.base import CausalFamily
from longrl.models.planning_sizes import AudioSizes, VisionSizes
from longrl.types import Media


def seeing_flops(encoder: VisionSizes, num_params: int, num_patches: float, spatial_patches: int) -> float:
    """Operations of seeing: n (2 Q + 4 X window) in windowed layers, 4 X n (patches of a temporal patch) in full ones.

    Args:
        encoder: its sizes.
        num_params: Q.
        num_patches: n.
        spatial_patches: those of them in one temporal patch.
    """
    num_windowed = encoder.num_layers - encoder.num_full_layers
    seen = num_windowed * min(encoder.window_patches, spatial_patches)
    seen += encoder.num_full_layers * spatial_patches
    return float(num_patches * (2 * num_params + 4 * encoder.width * seen))


def hearing_flops(encoder: AudioSizes, num_params: int, num_tokens: int) -> float:
    """Operations of hearing: 2 Q for each of a token's states; attention within seconds is left out."""
    return float(2 * num_tokens * encoder.states_per_token * num_params)


def count_encoder_params(family: CausalFamily, model: Any) -> tuple[int, int]:
    """Parameters of all media encoders, and of those among them that hear."""
    counts = [sum(one.numel() for one in module.parameters()) for module in family.media_encoders(model)]
    hears = sum(counts[1:]) if family.audio_sizes() else 0  # without, the others are projectors
    return sum(counts), hears


@dataclass(frozen=True)
class EncodeCost:
    """What media cost in the encoders of a model."""

    vision: VisionSizes | None
    audio: AudioSizes | None
    num_params: int
    """Of all encoders."""
    num_audio_params: int
    """Those of them that hear."""

    @classmethod
    def of(cls, family: CausalFamily, model: Any) -> EncodeCost:
        """Counted on a model; of one that sees and hears nothing, all is 0."""
        _, vision = family.planning_sizes()
        num_params, num_audio_params = count_encoder_params(family, model) if vision else (0, 0)
        return cls(vision, family.audio_sizes(), num_params, num_audio_params)

    def flops(self, family: CausalFamily, item: Media) -> float:
        """Operations for a media item of the family's; thumbnails of tiled images are left out."""
        if item.kind == "audio":
            assert self.audio is not None, "a model that does not hear has no sounds"
            return hearing_flops(self.audio, self.num_audio_params, family.num_features(item))
        assert self.vision is not None, "a model that does not see has no pictures"
        _, height, width = item.grid_thw
        params = self.num_params - self.num_audio_params
        return seeing_flops(self.vision, params, family.encoded_patches(item), height * width)
