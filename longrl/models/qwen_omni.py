"""Qwen2.5-Omni's thinker (arXiv:2503.20215): text, images, video and sound in; text out. Time-aligned M-RoPE.

A sound has 25 tokens per second, each at a position of its own; a video's temporal patches stand at 25 positions per
second. With `use_audio_in_video` a video's track stands among its features, chunk by chunk of two seconds, both counted
from one start:

    vision start, audio start, [frames of 0 to 2 s] [sound of 0 to 2 s] [frames of 2 to 4 s] ..., audio end, vision end

Ids and positions are those of the released code, which transformers 5.19 is; two things in it are worth knowing. The
tokens behind an interleaved video go on after its last piece, even if an earlier one reached further. And where frames
lie more than a chunk apart, chunks are cut within a frame. vLLM 0.32 does neither, and gives audio start a position of
its own. Times are computed in float64, as in transformers' processor and vLLM; transformers' positions are float32.

The audio encoder hears windows of two seconds, each on its own, so ranks share a sound by windows, and no sound is too
long. transformers' processor cuts sound after 300 s without a word; here none is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from longrl.models.building import OWN_WEIGHTS
from longrl.models.mrope import grid_positions
from longrl.models.planning_sizes import AudioSizes
from longrl.models.positioned_request import positioned_request
from longrl.models.qwen_vl import Qwen2_5_VLFamily, structure_of
from longrl.types import AudioClip, Frames, Media, Prompt

BLACK = Frames("image", torch.zeros(1, 3, 56, 56, dtype=torch.uint8), (0.0,), "black")
SPECTROGRAM_HZ = 100
"""Frames of a spectrogram in a second: steps of 160 samples at 16 kHz."""
SILENCE = AudioClip(torch.zeros(1600), 1600, "silence")


class QwenOmniFamily(Qwen2_5_VLFamily):
    """Qwen2.5-Omni's thinker of any size, from a released folder or one that holds the thinker alone.

    Args:
        model: folder or hub id; of a released one, talker and token2wav are not read.
        freeze_audio_encoder: leave the audio encoder as it is.
        use_audio_in_video: show every video with its sound track; a video without one is skipped and listed.
        system_prompt: system message; None leaves it to the chat template ("You are a helpful assistant.").
        kwargs: see `Qwen2_5_VLFamily`; `max_patches_per_encode` also bounds frames of the spectrogram in one call.

    Example:
        `QwenOmniFamily(model="Qwen/Qwen2.5-Omni-7B", dtype="bfloat16", use_audio_in_video=True)`
    """

    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    supports_audio = True
    answer_options: ClassVar[tuple[str, ...]] = ("use_audio_in_video", "system_prompt")
    training_options = ("freeze_audio_encoder",)
    encoder_configs = ("vision_config", "audio_config")
    ignored_weight_prefixes = ("talker.", "token2wav.")
    merges_tokens = False

    def __init__(
        self,
        model: str,
        freeze_audio_encoder: bool = True,
        use_audio_in_video: bool = False,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.freeze_audio_encoder = freeze_audio_encoder
        self.use_audio_in_video = use_audio_in_video
        self.system_prompt = system_prompt

    # -- the model -----------------------------------------------------------------------------------------------

    @override
    def read_config(self, source: Any) -> Any:
        """The thinker's."""
        config = super().read_config(source)
        return getattr(config, "thinker_config", config)

    @override
    def load_weights(self, source: str, **options: Any) -> Any:
        return super().load_weights(source, config=self.read_config(source), **options)

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        model = super().build(weights)
        model.audio_tower.requires_grad_(not self.freeze_audio_encoder)
        return model

    @override
    def backbone(self, model: Any) -> Any:
        return model.model

    @override
    def media_encoders(self, model: Any) -> tuple[nn.Module, ...]:
        return model.visual, model.audio_tower

    @override
    def projectors(self, model: Any) -> tuple[nn.Module, ...]:
        return *super().projectors(model), model.audio_tower.proj

    @override
    def encoder_settings(self) -> dict[str, Any]:
        return super().encoder_settings() | {
            "feature_extractor": self.processor.feature_extractor.to_dict(),
            "audio_config": structure_of(self.config.audio_config),
        }

    # -- prompts -------------------------------------------------------------------------------------------------

    @override
    def read_tokenizer(self) -> Any:
        """The processor's, with its chat template if the tokenizer's own files have none."""
        tokenizer = self.processor.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or self.processor.chat_template
        return tokenizer

    @override
    def media_token_ids(self) -> dict[str, int]:
        return {**super().media_token_ids(), "audio": self.config.audio_token_id}

    @override
    def patch_all(self, frames: Sequence[Frames | AudioClip]) -> list[Media]:
        media = super().patch_all(frames)
        for index, item in enumerate(media):
            if item.is_video_track:
                media[index - 1] = replace(media[index - 1], sound_tokens=self.num_features(item))
        return media

    @override
    def patch(self, frames: Frames | AudioClip) -> Media:
        """Patches; of a sound, the spectrogram of this rank's windows."""
        if not isinstance(frames, AudioClip):
            return super().patch(frames)
        outline = self.outline_media(frames)
        held = frames.shard.temporal_patches(outline.grid_thw[0])
        if not len(frames.waveform) or not held:
            return outline
        size = self._window_size
        mel = self._spectrogram(frames.waveform)[held.start * size : held.stop * size].clone()
        return replace(outline, patches=mel)

    @override
    def outline_media(self, frames: Frames | AudioClip) -> Media:
        if not isinstance(frames, AudioClip):
            return super().outline_media(frames)
        sound = frames
        extractor, size = self.processor.feature_extractor, self._window_size
        num_frames = self._num_frames(sound.num_samples)
        num_windows = math.ceil(num_frames / size)
        return Media(
            kind="audio",
            patches=torch.empty(0, extractor.feature_size),
            grid_thw=(num_windows, num_frames, 1),
            seconds_per_temporal_patch=size * extractor.hop_length / extractor.sampling_rate,
            timestamps=(),
            key=sound.key,
            is_video_track=sound.is_video_track,
        )

    def _num_frames(self, num_samples: int) -> int:
        """Frames of the spectrogram of a sound."""
        return math.ceil(num_samples / self.processor.feature_extractor.hop_length)

    @property
    def _window_size(self) -> int:
        """Frames of the spectrogram that the audio encoder hears together."""
        assert self.config.audio_config.n_window % 2 == 0, "pairs of states would be averaged across windows"
        return 2 * self.config.audio_config.n_window

    @property
    def _window_tokens(self) -> int:
        """Tokens of a whole window."""
        return self._window_size // 4

    def _spectrogram(self, waveform: Tensor) -> Tensor:
        """[frames, mel bins] of [S] samples, normalised over all of the sound.

        Zeros behind the end, one transform long, stand for the zeros up to 300 s that the processor pads with: further
        ones reach into no frame that counts.
        """
        extractor = self.processor.feature_extractor
        hop = extractor.hop_length
        padded = math.ceil((len(waveform) + extractor.n_fft) / hop) * hop
        result = extractor(
            waveform.numpy(), sampling_rate=extractor.sampling_rate, padding="max_length", max_length=padded,
            truncation=False, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return result["input_features"][0, :, : int(result["attention_mask"].sum())].T

    def num_features(self, media: Media) -> int:
        """Tokens of a media item: of a sound half of every other frame of its spectrogram, about 25 per second."""
        if media.kind != "audio":
            return super().num_features(media)
        num_windows, num_frames, _ = media.grid_thw
        states = (num_frames - 1) // 2 + 1
        return min((states - 2) // 2 + 1, num_windows * self._window_tokens)

    @override
    def placeholder_ids(self, media: Media) -> list[int]:
        """A video's includes its track, with the track's start and end; then the track itself has none."""
        if media.is_video_track:
            return []
        if media.sound_tokens is None:
            return super().placeholder_ids(media)
        tokens = self.media_token_ids()
        inside = [tokens[kind] for kind, piece in self._pieces(media) for _ in range(piece.start, piece.stop)]
        return [self.config.audio_start_token_id, *inside, self.config.audio_end_token_id]

    # -- positions -----------------------------------------------------------------------------------------------

    @override
    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        """[3, T] time, height and width position of every token (TMRoPE)."""
        media_tokens = torch.tensor(list(self.media_token_ids().values()))
        placeholders = torch.isin(input_ids, media_tokens).nonzero()[:, 0]
        parts = []
        token = 0  # index of the next token
        start: float = 0  # its position
        for item in media:
            if item.is_video_track:  # a part of the video before it
                continue
            block, length = self._block(item)
            first = int(placeholders[placeholders >= token][0])
            if item.sound_tokens is not None:  # audio start comes before the first placeholder
                first -= 1
            num_text = first - token
            parts.append((start + torch.arange(num_text)).expand(3, -1))
            parts.append(block + start + num_text)
            token = first + block.shape[1]
            start += num_text + length
        parts.append((start + torch.arange(len(input_ids) - token)).expand(3, -1))
        return torch.cat(parts, dim=1)

    def _block(self, media: Media) -> tuple[Tensor, float]:
        """[3, n] positions of a media item's placeholders from its first on, and where the text behind it goes on."""
        if media.kind == "audio":
            count = self.num_features(media)
            return torch.arange(count).expand(3, -1), count
        grid = self._grid_positions(media)
        if media.sound_tokens is None:
            return grid, grid.max().item() + 1
        sound = torch.arange(media.sound_tokens).expand(3, -1)
        inside = [(grid if kind == "video" else sound)[:, piece] for kind, piece in self._pieces(media)]
        end = inside[-1].max().item() + 1  # of the last piece alone, see the top of this file
        return self._between_marks(torch.cat(inside, dim=1), end)

    def _between_marks(self, inside: Tensor, end: float) -> tuple[Tensor, float]:
        """The same with the marks of a track: audio start is where vision start is, vision end where audio end is."""
        audio_start = torch.full((3, 1), -1)
        audio_end = torch.full((3, 1), end)
        return torch.cat([audio_start, inside, audio_end], dim=1), end

    def _grid_positions(self, media: Media) -> Tensor:
        step = media.seconds_per_temporal_patch * self.config.position_id_per_seconds
        return grid_positions(self.coarse(media), self.config.vision_config.spatial_merge_size, step)

    def _pieces(self, media: Media) -> list[tuple[str, slice]]:
        """Which features of a video and of its track follow one another: chunk by chunk, the video's first."""
        assert media.sound_tokens is not None
        size = int(self.config.position_id_per_seconds * self.config.seconds_per_chunk)
        seen = _chunks(self._grid_positions(media)[0].tolist(), size)
        heard = _chunks(range(media.sound_tokens), size)
        pieces: list[tuple[str, slice]] = []
        for video, audio in itertools.zip_longest(seen, heard):
            pair = (("video", video), ("audio", audio))
            pieces += [(kind, piece) for kind, piece in pair if piece is not None]
        return pieces

    # -- features ------------------------------------------------------------------------------------------------

    @override
    def encode_media(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] features of each media item.

        Pictures always come first, and an encoder whose weights are sharded always runs: ranks must go in step, also
        backwards. One that has nothing for an encoder adds no rows of a black image or of silence.
        """
        pictures = [item for item in media if item.kind != "audio"]
        sounds = [item for item in media if item.kind == "audio"]
        idle: list[Tensor] = []
        seen = super().encode_media(model, pictures)
        if not pictures and isinstance(model.visual, FSDPModule):
            idle += super().encode_media(model, [self.patch(BLACK)])
        heard = self._encode_sounds(model, sounds)
        if not sounds and isinstance(model.audio_tower, FSDPModule):
            idle += self._encode_sounds(model, [self.patch(SILENCE)])

        left = {False: iter(seen), True: iter(heard)}
        features = [next(left[item.kind == "audio"]) for item in media]
        none = [rows[:0] for rows in idle]
        return [torch.cat([rows, *none]) for rows in features] if idle else features

    def _encode_sounds(self, model: Any, media: Sequence[Media]) -> list[Tensor]:
        """[N_i, D] of sounds. The encoder attends within a window, so cutting a long one between windows is exact."""
        encoder = model.audio_tower
        features = []
        step = max(1, self.max_patches_per_encode // self._window_size) * self._window_size
        for item in media:
            outputs = []
            for piece in item.patches.to(encoder.device, encoder.dtype, non_blocking=True).split(step):
                outputs.append(self._encode_windows(encoder, piece, item))
            features.append(torch.cat(outputs))
        return features

    def _encode_windows(self, encoder: Any, piece: Tensor, media: Media) -> Tensor:
        """[n, D] of some windows' frames [frames, mel bins] of a sound."""
        length = torch.tensor([len(piece)], device=encoder.device)
        return encoder(piece.T, feature_lens=length).last_hidden_state

    # -- planning ------------------------------------------------------------------------------------------------

    @override
    def audio_sizes(self) -> AudioSizes:
        audio = self.config.audio_config
        return AudioSizes(
            width=audio.d_model,
            mlp_width=audio.encoder_ffn_dim,
            states_per_token=2,
            convolved_values=12 * audio.d_model,  # four rows of a token in, out and activated
        )

    @override
    def sound_tokens(self, seconds: float) -> int:
        if not self.use_audio_in_video:
            return 0
        num_frames = math.ceil(seconds * SPECTROGRAM_HZ)
        num_windows = math.ceil(num_frames / self._window_size)
        sound = Media("audio", torch.empty(0, 0), (num_windows, num_frames, 1), 0.0, (), "")
        return self.num_features(sound) + 2  # start and end of the track

    @override
    def sound_tokens_per_encode(self) -> int:
        return max(1, self.max_patches_per_encode // self._window_size) * self._window_tokens

    # -- rollout engines -----------------------------------------------------------------------------------------

    @override
    def engine_options(self) -> dict[str, Any]:
        from longrl.models.qwen_omni_vllm import as_features

        kinds = self.media_token_ids()
        # No media but features: vLLM builds no encoder, and measures none.
        limits = dict.fromkeys(kinds, 0)
        return {"enable_mm_embeds": True, "limit_mm_per_prompt": limits, "hf_overrides": as_features}

    @override
    def engine_weight(self, name: str) -> str | None:
        return None if name.startswith(("visual.", "audio_tower.")) else f"thinker.{name}"

    @override
    def engine_request(self, prompt: Prompt, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """Features with their positions: vLLM counts those of interleaved sound in another way than transformers."""
        return positioned_request(self.media_token_ids(), prompt, features)


def _chunks(times: Sequence[int], size: int) -> list[slice]:
    """Tokens cut as the released code does: before the first one at or behind the next multiple of `size`.

    Args:
        times: of every token, from 0 on, never falling.
        size: positions of a chunk.
    """
    starts = [0]
    border = size
    for index, time in enumerate(times):
        if time >= border:
            starts.append(index)
            border += size
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(times)])]
