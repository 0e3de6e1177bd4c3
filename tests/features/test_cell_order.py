"""Videos with their cells in another order, in every family that sees: rows are moved, nothing is encoded again."""

import dataclasses

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.features.rollout_features import RolloutFeatures
from longrl.models.cell_order import cell_order, in_order, shuffled_prompt
from longrl.packing.pack import pack
from longrl.types import SamplingParams
from tests.families import FAMILIES, SEEING
from tests.features.test_cached_families import frozen
from tests.tiny import text_family, vl_family


def patches_of_cells(item):
    """The patches of each temporal patch: Qwen has some of all its frames, VILA one of each frame, averaged later."""
    of_cell = item.grid_thw[1] * item.grid_thw[2]
    if len(item.patches) != item.grid_thw[0] * of_cell:
        of_cell = item.temporal_patch_size
    return item.patches.split(of_cell)


@pytest.mark.parametrize("name", SEEING)
def test_shuffled_features_are_those_of_shuffled_cells_and_engine_and_trainer_agree_on_them(name):
    family = frozen(name)
    model, prompts = family.build(), FAMILIES[name].prompts(family)
    cache = FeatureCache(family)
    ordered = cache.get_or_encode(model, prompts)
    num_encoded = cache.num_encoded
    shuffled = [shuffled_prompt(family, prompt, "seed") for prompt in prompts]
    assert shuffled[-1] is None, "there is nothing to shuffle in text"
    shuffled = [prompt for prompt in shuffled if prompt is not None]
    features = cache.get_or_encode(model, shuffled)

    # 1. Each video's features are those of its cells, every one encoded alone; all else is as it was.
    assert cache.num_encoded == num_encoded
    moved = [item for prompt in shuffled for item in prompt.media if item.cell_order]
    assert len(moved) >= 2
    for item in moved:
        assert sorted(item.cell_order) == [*range(item.grid_thw[0])] != [*item.cell_order]
        assert item.key not in ordered
        cells = patches_of_cells(in_order(item))
        with torch.no_grad():
            alone = [
                family.encode_media(model, [dataclasses.replace(in_order(item).part(1), patches=cells[cell])])[0]
                for cell in item.cell_order
            ]
        torch.testing.assert_close(features[item.key], torch.cat(alone), rtol=1e-5, atol=1e-5)
        assert not torch.equal(features[item.key], ordered[item.key_in_order])
    for before, after in zip(prompts, shuffled, strict=False):
        assert after.input_ids is before.input_ids
        assert after.position_ids is before.position_ids
        for one, other in zip(before.media, after.media, strict=True):
            assert one is other or one.kind == "video"

    # 2. An engine with caches of its own tells them apart: by ids, or by the rows themselves.
    requests = [family.engine_request(one, values) for one, values in ((prompts[0], ordered), (shuffled[0], features))]
    ids = [request.get("multi_modal_uuids") for request in requests]
    if ids[0] is None:
        assert not torch.equal(*(request["prompt_embeds"] for request in requests))
    else:
        assert ids[0] != ids[1]

    # 3. HFEngine, for which they are moved when it asks, samples what the trainer scores.
    lazy = RolloutFeatures(ordered, FeatureCache(family), moved)
    assert all(torch.equal(lazy[key], rows) for key, rows in features.items())
    sampling = SamplingParams(num_generations=2, max_completion_tokens=3)
    groups = HFEngine().generate(family, model, shuffled, lazy, sampling, seed=1)
    (packed,) = pack(shuffled, groups, 10_000)
    with torch.no_grad():
        logp = family.forward(model, packed, features).logp
    engine = torch.cat([completion.logprobs for group in groups for completion in group])
    torch.testing.assert_close(engine, logp, rtol=1e-4, atol=1e-4)


def test_an_order_is_a_permutation_that_its_seed_decides_and_never_the_one_in_order():
    orders = {cell_order(3, f"seed {number}") for number in range(60)}
    assert len(orders) == 5, "all but the one in order"
    assert cell_order(8, "a") == cell_order(8, "a") == (6, 5, 3, 1, 0, 7, 2, 4)
    assert cell_order(1, "a") == (0,)
    assert {cell_order(2, f"{number}") for number in range(9)} == {(1, 0)}


def test_a_family_whose_rows_are_not_those_of_cells_is_refused():
    class Summed(type(vl_family())):
        """A family that has a row for the video as a whole."""

        def num_features(self, media):
            return super().num_features(media) + (media.kind == "video")

    family = vl_family()
    prompts = FAMILIES["qwen2.5-vl"].prompts(family)
    with pytest.raises(ValueError, match=r"rows for 3 patches.*leave data.shuffle_frames"):
        shuffled_prompt(Summed(family.model_path), prompts[0], "seed")
    assert shuffled_prompt(text_family(), prompts[-1], "seed") is None
