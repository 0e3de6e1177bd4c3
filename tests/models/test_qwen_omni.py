"""Qwen2.5-Omni's thinker against transformers: its processor, positions and forward, from pixels and samples."""

import dataclasses
import pickle

import pytest
import torch

from longrl.features.cache import FeatureCache, encode_shard, row_indices
from longrl.models.planning_sizes import AudioSizes
from longrl.models.qwen_omni import _chunks
from longrl.packing.pack import pack
from longrl.planning import formulas
from longrl.planning.inputs import ModelSizes, Plan
from longrl.types import FrameShard, Media
from tests.tiny import frames, held, omni_family, omni_prompts, row, sound


def family_with(**kwargs):
    return omni_family(max_pixels=4 * 28 * 28, **kwargs)


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


def test_sound_is_not_cut_after_the_processors_limit():
    """30 s here, 300 s in the released model."""
    family = omni_family()
    media = family.patch(sound(41.0))
    assert family.processor.feature_extractor.n_samples == 30 * 16_000
    assert (media.patches.shape, family.num_features(media)) == ((4100, 32), 1025)


def test_a_missing_feature_names_its_kind():
    family = omni_family()
    model, prompts = family.build(), omni_prompts(family)[:1]
    features = FeatureCache(family).get_or_encode(model, prompts)
    features["beep"] = features["beep"][1:]
    (packed,) = pack(prompts, [[torch.arange(5)]], 10_000)
    with pytest.raises(ValueError, match=r"247 audio placeholders in the packed sequence, but 246 features"):
        family.forward(model, packed, features)


# ---- folders ----


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


def test_a_plan_counts_both_encoders():
    family = omni_family(use_audio_in_video=True)
    sizes = ModelSizes.from_family(family)
    audio = family.build().audio_tower
    own = sum(parameter.numel() for parameter in audio.parameters())
    assert sizes.vision_encoder.audio_params == own < sizes.vision_encoder.params
    config = family.config.audio_config
    assert sizes.audio_encoder == AudioSizes(
        width=config.d_model, mlp_width=config.encoder_ffn_dim, states_per_token=2, convolved_values=12 * config.d_model
    )
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
