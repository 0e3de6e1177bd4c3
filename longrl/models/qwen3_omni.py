"""Qwen3-Omni's thinker (arXiv:2509.17765): text, images, video and sound in; text out. A mixture of experts, DeepStack.

It hears otherwise than Qwen2.5-Omni (`longrl.models.qwen_omni`). A sound is cut into chunks of a second, each of which
three convolutions make 13 tokens of; attention goes over windows of eight chunks. A video's track stands among its
features token by token: a temporal patch comes before the first token of sound that is not earlier. Its start and end
have positions of their own.

Positions have fractions. One second is 13 of them, and a video's temporal patches stand where their times fall, as in
the released code, which transformers 5.19 is; vLLM 0.32 drops the fraction, see `whole_positions`. Computed in float64
and rounded to float32 once; transformers sums in float32.

Two things in transformers depend on what else is in a call, and here a sound is always what it is alone: its processor
pads a shorter sound with zeros, which is heard in the last hundredth of a second, and its encoder pads one below a
second to the longest of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from longrl.models.mrope import grid_positions
from longrl.models.planning_sizes import AudioSizes
from longrl.models.qwen3_vl import FACTOR, refuse_experts_on_a_cpu
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.types import Media, UnusableSample


class Qwen3OmniFamily(QwenOmniFamily):
    """Qwen3-Omni's thinker, Instruct or Thinking, from a released folder or one that holds the thinker alone.

    Args:
        model: folder or hub id; of a released one, talker and code2wav are not read.
        min_pixels: a frame or image is enlarged to at least this many pixels.
        max_pixels: a frame or image is shrunk to at most this many pixels.
        max_video_pixels: budget over all frames of a video; see `Qwen2_5_VLFamily`.
        whole_positions: drop the fractions of a video's positions, as vLLM does, which has no others.
        kwargs: see `QwenOmniFamily`.

    Example:
        `Qwen3OmniFamily(model="Qwen/Qwen3-Omni-30B-A3B-Instruct", dtype="bfloat16", use_audio_in_video=True)`
    """

    model_types = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
    answer_options = ("whole_positions",)
    ignored_weight_prefixes = ("talker.", "code2wav.")

    def __init__(
        self,
        model: str,
        min_pixels: int = 4 * FACTOR,
        max_pixels: int = 128 * FACTOR,
        max_video_pixels: int = 115_200 * FACTOR,
        whole_positions: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model, min_pixels=min_pixels, max_pixels=max_pixels, max_video_pixels=max_video_pixels, **kwargs
        )
        self.whole_positions = whole_positions

    @override
    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        audio = model.audio_tower
        return *super(QwenOmniFamily, self).projectors(model), audio.proj1, audio.proj2

    # -- sound ---------------------------------------------------------------------------------------------------

    @property
    def _chunk_size(self) -> int:
        """Frames of the spectrogram that the convolutions read together."""
        return 2 * self.config.audio_config.n_window

    @property
    @override
    def _window_size(self) -> int:
        """Frames of whole chunks, whose tokens attend to one another."""
        return self.config.audio_config.n_window_infer // self._chunk_size * self._chunk_size

    @property
    @override
    def _window_tokens(self) -> int:
        return self._num_tokens(self._window_size)

    def _num_tokens(self, num_frames: int) -> int:
        """Tokens of a sound: half of each chunk three times, rounded up; 13 of a second."""
        chunks, rest = divmod(num_frames, self._chunk_size)
        return chunks * _halved(self._chunk_size) + _halved(rest)

    @override
    def _num_frames(self, num_samples: int) -> int:
        extractor = self.processor.feature_extractor
        least = extractor.n_fft // 2 + 1
        if num_samples < least:  # the spectrogram mirrors half a transform at both ends; Qwen2.5-Omni's is of zeros
            raise UnusableSample(
                None,
                f"a sound of {num_samples} samples at {extractor.sampling_rate} Hz is too short for Qwen3-Omni, which "
                f"hears {least} and more; leave it out",
            )
        return num_samples // extractor.hop_length

    @override
    def _spectrogram(self, waveform: Tensor) -> Tensor:
        """[frames, mel bins] of [S] samples, as of a sound that the processor gets alone."""
        extractor = self.processor.feature_extractor
        result = extractor(
            waveform.numpy(), sampling_rate=extractor.sampling_rate, padding=True, truncation=False,
            return_tensors="pt",
        )  # fmt: skip
        return result["input_features"][0].T

    @override
    def num_features(self, media: Media) -> int:
        """Tokens of a media item: of a sound those of its windows, of which the last one may be shorter."""
        if media.kind != "audio":
            return super().num_features(media)
        num_windows, num_frames, _ = media.grid_thw
        return min(self._num_tokens(num_frames), num_windows * self._window_tokens)

    @override
    def _encode_windows(self, encoder: Any, piece: Tensor, media: Media) -> Tensor:
        """See `QwenOmniFamily`. The last chunk is as long as the others for the convolutions, whoever has those.

        Features of sound have no levels for deeper layers: zeros are added there.
        """
        chunks = piece.split(self._chunk_size)
        longest = min(media.grid_thw[1], self._chunk_size)
        padded = torch.stack([F.pad(chunk.T, (0, longest - len(chunk))) for chunk in chunks])  # [chunks, bins, frames]
        rows = encoder(
            piece.T,
            feature_lens=torch.tensor([len(piece)], device=encoder.device),
            padded_feature=padded,
            chunk_lengths=torch.tensor([len(chunk) for chunk in chunks], device=encoder.device),
        ).last_hidden_state
        return F.pad(rows, (0, self.feature_size - rows.shape[1]))

    # -- positions -----------------------------------------------------------------------------------------------

    @override
    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        """[3, T] time, height and width position of every token, in float32; whole ones in int64."""
        positions = super().position_ids(input_ids, media)
        return positions.long() if self.whole_positions else positions.float()

    @override
    def _between_marks(self, inside: Tensor, end: float) -> tuple[Tensor, float]:
        """Four marks one after the other: vision start, audio start; audio end, vision end."""
        audio_start = torch.zeros_like(inside[:, :1])
        audio_end = torch.full_like(audio_start, end + 1)
        return torch.cat([audio_start, inside + 1, audio_end], dim=1), end + 2

    @override
    def _grid_positions(self, media: Media) -> Tensor:
        positions = grid_positions(self.coarse(media), self.config.vision_config.spatial_merge_size, step=1)
        times = self._times(media)
        if self.whole_positions:
            times = times.floor()
        return torch.stack([times[positions[0]], positions[1], positions[2]])

    def _times(self, media: Media) -> Tensor:
        """[T] position of each temporal patch in float64, multiplied in the processor's order."""
        patches = torch.arange(media.grid_thw[0], dtype=torch.float64)
        return patches * media.seconds_per_temporal_patch * self.config.position_id_per_seconds

    @override
    def _pieces(self, media: Media) -> list[tuple[str, slice]]:
        """Which features of a video and of its track follow one another: before a temporal patch all earlier sound."""
        assert media.sound_tokens is not None
        num_rows = self.num_features(media.part(1))
        pieces: list[tuple[str, slice]] = []
        heard = 0  # tokens of sound so far
        for index, time in enumerate(self._times(media).ceil().int().tolist()):
            earlier = min(time, media.sound_tokens)
            pieces.append(("audio", slice(heard, earlier)))
            pieces.append(("video", slice(index * num_rows, (index + 1) * num_rows)))
            heard = earlier
        pieces.append(("audio", slice(heard, media.sound_tokens)))
        return [(kind, piece) for kind, piece in pieces if piece.start < piece.stop]

    # -- planning ------------------------------------------------------------------------------------------------

    @override
    def audio_sizes(self) -> AudioSizes:
        audio = self.config.audio_config
        # The first convolution's output, and what follows it, halved in frames and bins.
        widest = 2 * audio.downsample_hidden_size * -(-audio.num_mel_bins // 2) * self._chunk_size // 2
        return AudioSizes(
            width=audio.d_model,
            mlp_width=audio.encoder_ffn_dim,
            states_per_token=1,
            convolved_values=widest // _halved(self._chunk_size),
        )

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        refuse_experts_on_a_cpu(self)
        if not self.whole_positions:
            raise ValueError(
                "vLLM has whole positions only, and Qwen3-Omni's videos stand at fractions of them; set "
                "model.family.init_args.whole_positions=true, or use engine: longrl.engines.hf.HFEngine"
            )
        from longrl.models.qwen3_omni_vllm import as_features

        return {**super().engine_options(), "hf_overrides": as_features}


def _halved(num_frames: int) -> int:
    """Frames of a chunk behind three convolutions of stride 2."""
    for _ in range(3):
        num_frames = (num_frames + 1) // 2
    return num_frames
