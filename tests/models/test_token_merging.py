"""A fixed number of tokens of each video: what is kept and where it stands, against plain loops around transformers."""

import dataclasses

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.models.cell_order import shuffled_prompt
from longrl.models.token_merging import TokenMerging, without_places
from longrl.testing import check_family, family_claims
from longrl.types import UnusableSample
from tests.distributed import run_distributed
from tests.families import FAMILIES
from tests.models.plain_fewer_tokens import media_inputs, pooled_model
from tests.tiny import frames, omni_family, row, vl_family


def merging_family(name, **options):
    """Frames of 2 x 3 features and more, of which windows of three times keep at most so many."""
    side = 96 if name == "qwen3-vl" else 84
    return FAMILIES[name].make(**{"max_kept_tokens": 15, "merge_window": 3, "max_pixels": side * side, **options})


@pytest.mark.parametrize(
    ("name", "num_ranks", "options"),
    [
        ("qwen2.5-vl", 1, {"temporal_pool": 2, "merge_window": 2, "max_kept_tokens": 10}),
        ("qwen3-vl", 2, {"spatial_pool": 2, "max_kept_tokens": 7}),
    ],
)
def test_all_that_is_claimed_of_a_family_holds_with_merging(name, num_ranks, options, monkeypatch):
    """Packed == separate with every gradient, engine == trainer, cached == fresh, two ranks == one, observations."""
    monkeypatch.setattr(family_claims, "run_on_ranks", run_distributed)  # by processes that other tests start, too
    family = merging_family(name, **options)
    report = check_family(family, plain_model=pooled_model, media_inputs=media_inputs, num_ranks=num_ranks)
    assert {"shared prefix", "observations", "generation", "cached features"} <= report.checked.keys()
    assert ("SP" in report.checked) == (num_ranks > 1)


def test_what_hardly_differs_is_averaged_with_what_it_was_before():
    """One window of three times and three places: the middle place changes at the second, the last one at the third."""
    rows = torch.tensor([[[1, 0], [1, 0], [1, 0]], [[3, 0], [0, 1], [5, 0]], [[5, 0], [0, 3], [0, 7.0]]])
    found, places = without_places(TokenMerging(5, 3).merge(rows.flatten(0, 1), (3, 1, 3), kept=1, width=2))
    assert found.tolist() == [[3, 0], [1, 0], [3, 0], [0, 2], [0, 7]]
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 1], [0, 2]]

    whole = TokenMerging(100, 3).merge(rows.flatten(0, 1).bfloat16(), (3, 3, 1), kept=3, width=2)
    assert torch.equal(whole[:, :2], rows.flatten(0, 1).bfloat16())
    assert whole[:, 2:].tolist() == [[0, 0], [1, 0], [2, 0]] * 3


def test_the_number_of_tokens_is_known_before_anything_is_encoded():
    merging = TokenMerging(budget=100, window=4)
    assert merging.rows_of_patches(8, (4, 4)) == [16, 11, 11, 11] * 2
    assert merging.rows_of_patches(6, (4, 4)) == [16, 16, 16, 16, 16, 16]
    assert merging.rows_of_patches(9, (4, 4)) == [16, 8, 8, 8, 16, 8, 8, 8, 16]
    assert sum(TokenMerging(54, 4).rows_of_patches(9, (4, 4))) == 54
    with pytest.raises(UnusableSample, match=r"9 temporal patches of 16 .* windows of 4 keep 54 at least.*=53; raise"):
        TokenMerging(53, 4).rows_of_patches(9, (4, 4))
    with pytest.raises(UnusableSample, match=r"256 features along a side.* 2 x 257"):
        TokenMerging(53, 4).rows_of_patches(9, (2, 257))


def test_tokens_stand_at_their_own_time_height_and_width_and_text_where_it_would_behind_all_of_them():
    """14 frames at 0.7 s: seven patches in windows of three, the last window of one; 3 x 3 features of each."""
    family = vl_family(max_kept_tokens=40, merge_window=3, max_pixels=84 * 84)
    prompt = family.render(row(), "<video> what?", [frames(14, 84, 84)])
    every = vl_family(max_pixels=84 * 84).render(row(), "<video> what?", [frames(14, 84, 84)])
    (item,) = prompt.media
    assert (item.grid_thw, len(item.timestamps), item.temporal_patch_size) == ((3, 6, 6), 7, 6)
    assert (item.timestamps, item.seconds_per_temporal_patch) == (
        every.media[0].timestamps,
        every.media[0].seconds_per_temporal_patch,
    )
    rows = [9, 3, 3, 9, 3, 3, 9]
    assert family.rows_of_patches(item) == rows
    assert family.num_features(item.part(1)) == 15
    token = family.media_token_ids()["video"]
    here, there = prompt.input_ids == token, every.input_ids == token
    assert int(here.sum()) == 39
    assert torch.equal(prompt.position_ids[:, ~here], every.position_ids[:, ~there])
    model = family.build()
    features = FeatureCache(family).get_or_encode(model, [prompt])[item.key]
    _, offsets = family.rows_and_offsets(features)
    found = prompt.position_ids[:, here] + offsets.T
    of_patches = every.position_ids[:, there].view(3, 7, 9)
    places = offsets[:, 1] * 3 + offsets[:, 2]
    times = torch.arange(7).repeat_interleave(torch.tensor(rows))
    assert torch.equal(found, of_patches[:, times, places])
    assert torch.equal(places[:9], torch.arange(9))
    assert all(part.diff().min() > 0 for part in places.split(rows))


def test_what_cannot_be_done_is_refused():
    family = merging_family("qwen3-vl")
    prompt = family.render(row(), "<video>", [frames(10, 60, 90)])
    with pytest.raises(ValueError, match=r"vLLM counts .*max_kept_tokens=15.*use engine: longrl.engines.hf.HFEngine"):
        merging_family("qwen3.5").engine_options()
    with pytest.raises(ValueError, match=r"differ with model.family.init_args.max_kept_tokens; leave that out"):
        shuffled_prompt(family, prompt, "seed")
    with pytest.raises(ValueError, match="videos stand among sound; use temporal_pool and spatial_pool"):
        omni_family(max_kept_tokens=100)
    with pytest.raises(ValueError, match=r"init_args.merge_window must be at least 2, got 1"):
        vl_family(max_kept_tokens=100, merge_window=1)
    with pytest.raises(UnusableSample, match=r"max_kept_tokens=15; raise it"):
        family.outline_media(dataclasses.replace(frames(60, 60, 90)))


def test_the_options_are_part_of_answers_and_of_features_on_disk():
    plain, merging = vl_family(), vl_family(max_kept_tokens=100, merge_window=4)
    assert merging.identity() == plain.identity() | {"max_kept_tokens": 100, "merge_window": 4}
    assert merging.encoder_settings() == plain.encoder_settings() | {"merging": {"budget": 100, "window": 4}}
    assert vl_family(max_kept_tokens=100).encoder_settings()["merging"]["window"] == 8
    assert merging.feature_size == plain.feature_size + 2
