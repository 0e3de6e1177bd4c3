"""Qwen with pooled features against transformers' own model, whose features are averaged in plain loops."""

import dataclasses

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.features.provenance import encoder_provenance
from longrl.models.cell_order import shuffled_prompt
from longrl.models.feature_pooling import FeaturePooling
from longrl.packing.pack import pack
from longrl.testing import check_family
from longrl.types import SamplingParams
from tests.families import FAMILIES
from tests.models.plain_fewer_tokens import media_inputs, pooled_model
from tests.tiny import frames, qwen2_vl_family, qwen3_vl_family, row, vl_family


def pooling_family(name, **options):
    side = 96 if name.startswith("qwen3") else 84  # three features: of two pools of two one is not full
    return FAMILIES[name].make(**{"temporal_pool": 2, "spatial_pool": 2, "max_pixels": side * side, **options})


@pytest.mark.parametrize(
    "name",
    ["qwen2.5-vl", "qwen3-vl", "qwen3-omni"],  # two ranks: test_token_merging.py
)
def test_all_that_is_claimed_of_a_family_holds_with_pooling(name):
    """Packed == separate with every gradient, engine == trainer, cached == fresh, observations."""
    report = check_family(pooling_family(name), plain_model=pooled_model, media_inputs=media_inputs, num_ranks=1)
    assert {"shared prefix", "observations", "generation", "cached features"} <= report.checked.keys()


def test_means_by_hand_with_what_is_left_at_the_edges():
    rows = torch.arange(2 * 3 * 3, dtype=torch.float32)[:, None]  # T = 2, H = W = 3
    found = FeaturePooling(space=2).average(rows, (2, 3, 3))[:, 0]
    assert found.tolist() == [2, 3.5, 6.5, 8, 11, 12.5, 15.5, 17]
    assert FeaturePooling(time=2).average(rows, (2, 3, 3))[:, 0].tolist() == [x + 4.5 for x in range(9)]
    assert FeaturePooling(time=3, space=4).average(rows, (2, 3, 3)).tolist() == [[8.5]]
    thirds = torch.tensor([[0.0], [3.0], [9.0]]).bfloat16()
    assert FeaturePooling(time=2).average(thirds, (3, 1, 1)).tolist() == [[1.5], [9.0]]


def test_a_pooled_video_stands_where_its_first_patches_did_and_has_the_mean_of_their_times():
    """7 frames at 0.7 s: patches at 0, 1.4, 2.8, 4.2 s, the last of one frame; 3 x 3 features of each."""
    video = frames(7, 84, 84)
    family = pooling_family("qwen2.5-vl")
    prompt = family.render(row(), "<video>", [video])
    (item,) = prompt.media
    assert item.grid_thw == (2, 6, 6)
    assert family.num_features(item) == 2 * 2 * 2
    assert family.encoded_patches(item) == 4 * 36
    assert item.seconds_per_temporal_patch == pytest.approx(2.8)
    assert item.timestamps == pytest.approx((1.05, 3.5))
    (places,) = torch.isin(prompt.input_ids, torch.tensor(family.media_token_ids()["video"])).nonzero(as_tuple=True)
    start = int(prompt.position_ids[0, places[0]])
    step = int(2.8 * family.config.vision_config.tokens_per_second)
    found = (prompt.position_ids[:, places] - start).T.tolist()
    assert found == [[t * step, y, x] for t in range(2) for y in range(2) for x in range(2)]
    assert int(prompt.position_ids[0, places[-1] + 1]) == start + step + 1

    words = pooling_family("qwen3-vl").render(row(), "<video>", [frames(7, 96, 96)])
    text = qwen3_vl_family().tokenizer.decode(words.input_ids)
    assert "<1.1 seconds>" in text.replace("<1.0 ", "<1.1 ")  # 1.05, rounded either way
    assert "<3.5 seconds>" in text

    plain = qwen2_vl_family(temporal_pool=2).render(row(), "<video>", [video])
    assert plain.position_ids[0].diff().max() == 1, "Qwen2-VL's patches stand one apart, however long they last"


def test_a_budget_in_tokens_is_one_of_what_the_text_stack_reads():
    options = {"min_pixels": 28 * 28, "max_pixels": 1 << 24, "max_video_tokens": 800}
    for pools in ({}, {"temporal_pool": 4}, {"spatial_pool": 2}, {"temporal_pool": 2, "spatial_pool": 3}):
        family = vl_family(**options, **pools)
        item = family.outline_media(frames(16, 720, 1280))
        assert 400 < family.num_features(item) <= 800 * 1.25, "edges that no pool fills are above it"


def test_pooling_is_part_of_answers_and_of_features_on_disk_and_nothing_changes_without():
    plain, pooled = vl_family(), vl_family(temporal_pool=2)
    assert "temporal_pool" not in plain.identity()
    assert plain.encoder_settings().keys() == pooled.encoder_settings().keys() - {"pooling"}
    assert pooled.identity() == plain.identity() | {"temporal_pool": 2}
    model = plain.build()
    assert encoder_provenance(plain, model) != encoder_provenance(pooled, model)
    with pytest.raises(ValueError, match=r"model.family.init_args.spatial_pool must be at least 1, got 0"):
        vl_family(spatial_pool=0)


def test_pools_are_shuffled_whole():
    family = pooling_family("qwen3-vl", freeze_vision_encoder=True)
    model = family.build()
    prompt = family.render(row(), "<video>", [frames(12, 96, 96)])
    other = shuffled_prompt(family, prompt, "seed")
    features = FeatureCache(family).get_or_encode(model, [prompt, other])
    (before,), (after,) = prompt.media, other.media
    rows = features[before.key].unflatten(0, (3, -1))
    assert torch.equal(features[after.key], torch.cat([rows[cell] for cell in after.cell_order]))


def test_a_long_video_is_encoded_pool_by_pool():
    """Calls of one pool each, while frames are still being decoded, and the engine on what they give."""
    whole = pooling_family("qwen3-vl", freeze_vision_encoder=True)
    few = pooling_family("qwen3-vl", freeze_vision_encoder=True, max_patches_per_encode=72)
    model = whole.build()
    video = frames(11, 96, 96)
    prompt = whole.render(row(), "<video>", [video])
    (item,) = prompt.media
    assert few.temporal_patches_per_encode(item) == 1  # of 2 x 36 patches
    streamed = dataclasses.replace(item, patches=torch.empty(0, 0), source=lambda: iter([video]))
    streamed = dataclasses.replace(prompt, media=(streamed,))
    found = FeatureCache(few).get_or_encode(model, [streamed])
    expected = FeatureCache(whole).get_or_encode(model, [prompt])
    torch.testing.assert_close(found[item.key], expected[item.key], rtol=1e-5, atol=1e-6)
    groups = HFEngine().generate(few, model, [streamed], found, SamplingParams(1, 2), seed=1)
    (packed,) = pack([prompt], groups, 10_000)
    with torch.no_grad():
        logp = whole.forward(model, packed, expected).logp
    torch.testing.assert_close(groups[0][0].logprobs, logp, rtol=1e-4, atol=1e-4)
