"""Prompts of mixed media as families render them that hear, and the same from transformers' own processor."""

import dataclasses

import torch
from torch.nn.utils.rnn import pad_sequence

from longrl.features.cache import FeatureCache
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.packing.pack import pack
from longrl.types import AudioClip, Frames, Prompt
from tests.tiny import frames, row, sound


@dataclasses.dataclass(frozen=True)
class Case:
    """What a prompt shows, in order; `spacing` of frames is the same for all its videos, as transformers wants it."""

    text: str
    media: tuple[Frames | AudioClip, ...] = ()
    spacing: float = 0.5

    @property
    def tracks(self) -> bool:
        return any(isinstance(item, AudioClip) and item.is_video_track for item in self.media)


def clip(count, seconds, key="v", spacing=0.5, height=60, width=90):
    """A video with its track."""
    return frames(count, height, width, key, spacing=spacing), sound(seconds, f"{key} track", is_video_track=True)


IMAGE, OTHER = frames(1, 40, 40, "i", "image"), frames(1, 83, 131, "j", "image")
CASES = {
    "text": Case("Which one?"),
    "image": Case("What is <image> this?", (IMAGE,)),
    "two images": Case("<image> and <image>", (IMAGE, OTHER)),
    "video": Case("What <video> next?", (frames(7, 60, 90, spacing=0.5),)),
    "sound": Case("What <audio> is it?", (sound(3.21),)),
    "short sound": Case("What <audio> is it?", (sound(0.1, "short"),)),
    "sounds": Case("<audio>or<audio>", (sound(1.1, "short"), sound(8.013, "long"))),
    "sound of one window and a hundredth": Case("", (sound(2.01, "edge"),)),
    "all, the video mute": Case("<image>,<audio>,<video>?", (OTHER, sound(1.7), frames(4, 87, 113, spacing=0.5))),
    "track": Case("What <video> next?", clip(12, 6.0)),
    "longer track": Case("What <video> next?", clip(6, 9.4)),
    "much longer track": Case("What <video> next?", clip(2, 7.7)),
    "shorter track": Case("What <video> next?", clip(20, 3.3)),
    "one cell, short track, wide frame": Case("<video>", clip(1, 0.13, height=28, width=112)),
    "odd number of frames": Case("<video>", clip(9, 4.4)),
    "cells further apart than a chunk": Case("<video>?", clip(9, 17.0, spacing=1.75), 1.75),
    "uneven rate": Case("<video> or <video>?", (*clip(7, 6.2, "v1", 0.713), *clip(4, 1.9, "v2", 0.713)), 0.713),
    "dense cells": Case("<video>?", clip(24, 3.0, spacing=0.125), 0.125),
    "two tracks": Case("<video> or <video>", (*clip(6, 5.3, "v1"), *clip(9, 3.1, "v2"))),
    "track, image, sound": Case("<video>,<image>,<audio>?", (*clip(6, 2.9), IMAGE, sound(2.3))),
    "sound, track, image": Case("<audio>,<video>,<image>?", (sound(2.3), *clip(6, 4.9), OTHER)),
}


def rendered(family: QwenOmniFamily, case: Case) -> Prompt:
    return family.render(row(), case.text, case.media)


def theirs(family: QwenOmniFamily, case: Case) -> dict[str, torch.Tensor]:
    """transformers' own inputs, from pixels and samples."""
    pictures = [item for item in case.media if isinstance(item, Frames)]
    sounds = [item.waveform.numpy() for item in case.media if isinstance(item, AudioClip)]
    options = {}
    if images := [item.pixels[0] for item in pictures if item.kind == "image"]:
        options |= {"images": images, "images_kwargs": {"size": size_of(family)}}
    videos = [item.pixels for item in pictures if item.kind == "video"]
    if videos:
        options["videos"] = videos
    processor = family.processor
    text = family.tokenizer.decode(unexpanded(family, case))
    inputs = dict(processor(
        text=text,
        audio=sounds or None,
        videos_kwargs={
            "size": size_of(family), "do_sample_frames": False, "fps": 1 / case.spacing,
            "cap_pixels_per_frame": False, "use_audio_in_video": case.tracks,
        },
        return_tensors="pt",
        **options,
    ))  # fmt: skip
    if sounds:
        inputs |= alone(processor, sounds)
    if videos:
        inputs["video_second_per_grid"] = torch.as_tensor(inputs["video_second_per_grid"])
    return inputs | ({"use_audio_in_video": True} if case.tracks else {})


def with_biases(model):
    """The same model with biases that are not zero, and larger convolutions: so it hears whether zeros follow."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or ".conv" in name:
            torch.nn.init.normal_(parameter.detach(), std=0.1, generator=generator)
    return model


def alone(processor, sounds):
    """Spectrograms of sounds that the processor gets one by one; together, Qwen3-Omni's hears zeros behind some."""
    parts = [processor(text=processor.audio_token, audio=[item], return_tensors="pt") for item in sounds]
    features = [part["input_features"][0].T for part in parts]
    masks = [part["feature_attention_mask"][0] for part in parts]
    return {
        "input_features": pad_sequence(features, batch_first=True).mT,
        "feature_attention_mask": pad_sequence(masks, batch_first=True),
    }


def size_of(family):
    return {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}


def unexpanded(family, case):
    """The chat with one placeholder per medium."""
    shown = [item for item in family.patch_all(case.media) if not item.is_video_track]
    return family.chat_ids(case.text, shown, row())


def logits_of(family, model, prompt):
    """[T, V] by our own features, embeddings and packed attention."""
    features = FeatureCache(family).get_or_encode(model, [prompt])
    (packed,) = pack([prompt], [[]], 10_000)
    inputs = family.text_inputs(model, packed, features)
    hidden = family.hidden_states(model, packed.position_ids[:, None], spans=packed.spans, **inputs)
    return hidden[0] @ model.get_output_embeddings().weight.T
