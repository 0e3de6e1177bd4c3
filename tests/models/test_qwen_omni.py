"""Qwen2.5-Omni's thinker against transformers: its processor, positions and forward, from pixels and samples."""

import dataclasses
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache, encode_shard, row_indices
from longrl.models.planning_sizes import AudioSizes
from longrl.models.qwen_omni import QwenOmniFamily, _chunks
from longrl.packing.pack import pack
from longrl.planning import formulas
from longrl.planning.inputs import ModelSizes, Plan
from longrl.types import AudioClip, Frames, FrameShard, Media, Prompt, SamplingParams
from tests.families import proves
from tests.tiny import frames, held, omni_family, omni_folder, omni_prompts, plain_model, row, sound


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
    "sounds": Case("<audio>or<audio>", (sound(0.1, "short"), sound(8.013, "long"))),
    "sound of one window and a hundredth": Case("", (sound(2.01, "edge"),)),
    "all, the video mute": Case("<image>,<audio>,<video>?", (OTHER, sound(1.7), frames(4, 87, 113, spacing=0.5))),
    "track": Case("What <video> next?", clip(12, 6.0)),
    "longer track": Case("What <video> next?", clip(6, 9.4)),
    "much longer track": Case("What <video> next?", clip(2, 7.7)),
    "shorter track": Case("What <video> next?", clip(20, 3.3)),
    "one cell, short track, wide frame": Case("<video>", clip(1, 0.13, height=28, width=112)),
    "odd number of frames": Case("<video>", clip(9, 4.4)),
    "cells further apart than a chunk": Case("<video>?", clip(9, 17.0, spacing=1.75), 1.75),
    "dense cells": Case("<video>?", clip(24, 3.0, spacing=0.125), 0.125),
    "two tracks": Case("<video> or <video>", (*clip(6, 5.3, "v1"), *clip(9, 3.1, "v2"))),
    "track, image, sound": Case("<video>,<image>,<audio>?", (*clip(6, 2.9), IMAGE, sound(2.3))),
    "sound, track, image": Case("<audio>,<video>,<image>?", (sound(2.3), *clip(6, 4.9), OTHER)),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of its processor
every = pytest.mark.parametrize("name", list(CASES))


def family_with(**kwargs):
    return omni_family(max_pixels=4 * 28 * 28, **kwargs)


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
    inputs = processor(
        text=text,
        audio=sounds or None,
        videos_kwargs={
            "size": size_of(family), "do_sample_frames": False, "fps": 1 / case.spacing,
            "cap_pixels_per_frame": False, "use_audio_in_video": case.tracks,
        },
        return_tensors="pt",
        **options,
    )  # fmt: skip
    if videos:
        inputs["video_second_per_grid"] = torch.as_tensor(inputs["video_second_per_grid"])
    return dict(inputs) | ({"use_audio_in_video": True} if case.tracks else {})


def size_of(family):
    return {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}


def unexpanded(family, case):
    """The chat with one placeholder per medium."""
    shown = [item for item in family.patch_all(case.media) if not item.is_video_track]
    return family.chat_ids(case.text, shown, row())


@every
def test_ids_are_those_of_the_models_own_processor(name):
    family, case = family_with(), CASES[name]
    assert rendered(family, case).input_ids.tolist() == theirs(family, case)["input_ids"][0].tolist()


@every
def test_patches_and_spectrograms_are_those_of_the_models_own_processor(name):
    family, case = family_with(), CASES[name]
    media, inputs = rendered(family, case).media, theirs(family, case)
    for kind, values in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        if own := [item.patches for item in media if item.kind == kind]:
            assert torch.equal(torch.cat(own), inputs[values])
    sounds = [item for item in media if item.kind == "audio"]
    for place, item in enumerate(sounds):
        heard = inputs["feature_attention_mask"][place].bool()
        torch.testing.assert_close(item.patches, inputs["input_features"][place][:, heard].T, rtol=0, atol=2e-6)


@every
def test_positions_are_those_of_the_model(name):
    family, case = family_with(), CASES[name]
    prompt, inputs = rendered(family, case), theirs(family, case)
    mask = inputs.get("feature_attention_mask")
    wanted, _ = family.build().get_rope_index(
        inputs["input_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
        case.tracks,
        None if mask is None else mask.sum(1),
        inputs.get("video_second_per_grid"),
    )
    assert torch.equal(prompt.position_ids, wanted[:, 0])


@proves("same logits", "qwen2.5-omni")
@every
def test_logits_are_those_of_transformers_from_pixels_and_samples(name):
    """Its own processor, positions and forward, of every token of the prompt."""
    family, case = family_with(), CASES[name]
    model, prompt = family.build(), rendered(family, case)
    wanted = plain_model(model, family)(**theirs(family, case)).logits[0]
    torch.testing.assert_close(logits_of(family, model, prompt), wanted, rtol=1e-4, atol=1e-5)


def logits_of(family, model, prompt):
    """[T, V] by our own features, embeddings and packed attention."""
    features = FeatureCache(family).get_or_encode(model, [prompt])
    (packed,) = pack([prompt], [[]], 10_000)
    inputs = family.text_inputs(model, packed, features)
    hidden = family.hidden_states(model, packed.position_ids[:, None], spans=packed.spans, **inputs)
    return hidden[0] @ model.get_output_embeddings().weight.T


@pytest.mark.parametrize("name", ["sound", "track", "longer track", "shorter track", "two tracks"])
def test_greedy_tokens_are_those_of_generate(name):
    family, case = family_with(), CASES[name]
    model, prompt, inputs = family.build(), rendered(family, case), theirs(family, case)
    features = FeatureCache(family).get_or_encode(model, [prompt])
    ((found,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 12, 0.0), seed=0)
    eos = family.tokenizer.eos_token_id
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
    wanted = plain_model(model, family).generate(**inputs, **options)
    assert found.token_ids.tolist() == wanted[0, inputs["input_ids"].shape[1] :].tolist()


# ---- positions worked out by hand ----


def test_cells_and_sound_share_one_clock():
    """Two cells of 1 x 2 tokens, 1.2 s apart: at 0 and 30. 60 tokens of sound: 50 in the first chunk of two seconds."""
    family = family_with()
    video = Media("video", torch.zeros(0), (2, 2, 4), 1.2, (0.3, 1.5), "v", sound_tokens=60)
    block, end = family._block(video)
    tokens = family.media_token_ids()
    content = [tokens["video"]] * 4 + [tokens["audio"]] * 60
    assert family.placeholder_ids(video) == [
        family.config.audio_start_token_id,
        *content,
        family.config.audio_end_token_id,
    ]
    assert block[:, :5].tolist() == [[-1, 0, 0, 30, 30], [-1, 0, 0, 0, 0], [-1, 0, 1, 0, 1]]
    assert block[0, 5:].tolist() == [*range(60), 60]
    assert end == 60


def test_a_cell_in_the_second_chunk_comes_behind_the_sound_of_the_first():
    """Cells of one token at 0 and 2.4 s (60 positions); the sound has 0 .. 49 in the first chunk and 50, 51 behind."""
    video = Media("video", torch.zeros(0), (2, 2, 2), 2.4, (0.6, 3.0), "v", sound_tokens=52)
    block, end = family_with()._block(video)
    assert block[0].tolist() == [-1, 0, *range(50), 60, 50, 51, 52]
    assert end == 52  # behind the last piece, though a cell stands at 60: as released


def test_chunks_are_cut_before_the_first_token_behind_a_border():
    assert _chunks([0, 0, 49, 50, 99, 100], 50) == [slice(0, 3), slice(3, 5), slice(5, 6)]
    assert _chunks([0, 0, 100, 100, 100], 50) == [slice(0, 2), slice(2, 3), slice(3, 5)]  # within a cell, as released
    assert _chunks(range(3), 50) == [slice(0, 3)]


# ---- features ----


@pytest.mark.parametrize("seconds", [0.1, 1.99, 2.0, 2.01, 2.02, 2.03, 6.77, 12.0])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_a_sound_by_windows(seconds, size):
    """What each rank's windows give, laid end to end, is what the encoder makes of the whole."""
    family = omni_family()
    model, whole = family.build(), sound(seconds)
    (wanted,) = family.encode_media(model, [family.patch(whole)])
    parts = []
    for rank in range(size):
        media = family.patch(dataclasses.replace(whole, shard=FrameShard(rank, size)))
        count = len(FrameShard(rank, size).temporal_patches(media.grid_thw[0]))
        parts += family.encode_media(model, [media.part(count)]) if count else []
    assert len(wanted) == family.num_features(family.patch(whole))
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-5, atol=1e-6)


def test_cached_features_equal_fresh_ones():
    family = omni_family()
    model, prompts = family.build(), omni_prompts(family)
    media = [item for prompt in prompts for item in prompt.media]
    cache = FeatureCache(family)
    cached = cache.get_or_encode(model, prompts)
    for item, fresh in zip(media, family.encode_media(model, media), strict=True):
        assert fresh.shape == (family.num_features(item), family.feature_size)
        torch.testing.assert_close(cached[item.key], fresh, rtol=1e-5, atol=1e-6)
    again = cache.get_or_encode(model, prompts)
    assert cache.num_encoded == len(media)
    assert all(again[key] is value for key, value in cached.items())


def test_cutting_a_long_sound_between_windows_changes_nothing():
    family = omni_family()
    model, media = family.build(), [family.patch(sound(9.3))]
    (whole,) = family.encode_media(model, media)
    family.max_patches_per_encode = 450
    (cut,) = family.encode_media(model, media)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_sound_is_not_cut_after_the_processors_limit():
    """30 s here, 300 s in the released model."""
    family = omni_family()
    media = family.patch(sound(41.0))
    assert family.processor.feature_extractor.n_samples == 30 * 16_000
    assert (media.patches.shape, family.num_features(media)) == ((4100, 32), 1025)


def test_every_kind_of_medium_reaches_the_log_probabilities():
    family = omni_family()
    model, prompts = family.build(), omni_prompts(family)[:1]
    features = FeatureCache(family).get_or_encode(model, prompts)
    (packed,) = pack(prompts, [[torch.arange(5)]], 10_000)
    with torch.no_grad():
        whole = family.forward(model, packed, features).logp
        for item in prompts[0].media:
            without = features | {item.key: torch.zeros_like(features[item.key])}
            assert float((family.forward(model, packed, without).logp - whole).abs().max()) > 1e-5, item.kind


def test_a_missing_feature_names_its_kind():
    family = omni_family()
    model, prompts = family.build(), omni_prompts(family)[:1]
    features = FeatureCache(family).get_or_encode(model, prompts)
    features["beep"] = features["beep"][1:]
    (packed,) = pack(prompts, [[torch.arange(5)]], 10_000)
    with pytest.raises(ValueError, match=r"222 audio placeholders in the packed prompts, but 221 features"):
        family.forward(model, packed, features)


# ---- folders ----


def test_a_released_folder_and_a_thinker_alone_are_the_same_model(tmp_path):
    """Written as the thinker alone; read from there, and from a folder with `thinker.` names and a talker."""
    family = omni_family()
    model, whole, thinker = family.build(), tmp_path / "whole", tmp_path / "thinker"
    model.save_pretrained(thinker)
    family.save_processing(thinker)
    weights = {f"thinker.{name}": value for name, value in load_file(thinker / "model.safetensors").items()}
    family.processor.save_pretrained(whole)
    shutil.copy(f"{omni_folder()}/config.json", whole)
    others = {"talker.model.norm.weight": torch.ones(3), "token2wav.code2wav.x": torch.ones(2)}
    save_file(weights | others, whole / "model.safetensors", metadata={"format": "pt"})
    for folder in (thinker, whole):
        loaded = QwenOmniFamily(str(folder), max_pixels=56 * 56)
        state = loaded.build().state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        prompt = loaded.render(row(), "<audio>?", [sound(1.0)])
        assert torch.equal(prompt.input_ids, family.render(row(), "<audio>?", [sound(1.0)]).input_ids)


def test_transformers_loads_what_is_written(tmp_path):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    family = omni_family()
    model = family.build()
    model.save_pretrained(tmp_path)
    loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_towers_are_frozen_each_on_its_own():
    for vision, audio in ((True, True), (True, False), (False, True), (False, False)):
        family = omni_family(freeze_vision_encoder=vision, freeze_audio_encoder=audio)
        model = family.build()
        trains = [
            all(part.requires_grad for part in vision_encoder.parameters())
            for vision_encoder in family.media_encoders(model)
        ]
        assert trains == [not vision, not audio]
        assert bool(family.trained_encoders(model)) == (not (vision and audio))


def test_a_family_travels_to_workers():
    family = omni_family(use_audio_in_video=True, system_prompt="Listen.")
    assert family.tokenizer is not None
    copy = pickle.loads(pickle.dumps(family))
    assert copy.use_audio_in_video
    assert "Listen." in copy.tokenizer.decode(copy.render(row(), "x").input_ids)
    assert "helpful assistant" in omni_family().tokenizer.decode(omni_family().render(row(), "x").input_ids)


@pytest.mark.parametrize("seconds", [0.3, 1.98, 2.0, 5.3])
def test_a_plan_counts_the_tokens_of_a_track(seconds):
    family = omni_family(use_audio_in_video=True)
    assert family.sound_tokens(seconds) == family.num_features(family.patch(sound(seconds))) + 2
    assert omni_family().sound_tokens(seconds) == 0


def test_a_plan_counts_both_encoders():
    family = omni_family(use_audio_in_video=True)
    sizes = ModelSizes.from_family(family)
    audio = family.build().audio_tower
    own = sum(parameter.numel() for parameter in audio.parameters())
    assert sizes.vision_encoder.audio_params == own < sizes.vision_encoder.params
    config = family.config.audio_config
    assert sizes.audio_encoder == AudioSizes(width=config.d_model, mlp_width=config.encoder_ffn_dim)
    plan = Plan(sizes, sound_tokens=100, sound_together=40, weight_bytes=2, gathered_bytes=2)
    widest = max(12 * config.d_model, 4 * config.d_model + 6 * config.encoder_ffn_dim)
    assert formulas.audio_activations(plan) == 40 * widest * 2
    assert formulas.audio_activations(dataclasses.replace(plan, sp_group_size=4)) == 25 * widest * 2
    assert formulas.feature_memory(plan) == 2 * plan.prompts_per_batch * 100 * sizes.feature_size


def test_gathered_rows_lie_where_the_whole_has_them():
    """One rank alone, to pin the order of rows that sharing relies on."""
    from longrl.strategies.parallel import Parallel

    family = omni_family()
    model, media = family.build(), [family.patch(sound(5.3)), family.patch(held(frames(5), FrameShard()))]
    rows = encode_shard(family, model, media, Parallel())
    places = row_indices(family, media, 3)
    assert torch.equal(torch.cat(places).sort().values, torch.arange(len(rows)))
