"""Features of what completions were shown: found again, on all ranks of a sequence-parallel group, with one encode."""

from dataclasses import replace

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.features.rollout_features import RolloutFeatures, shared_features
from longrl.features.trainable_features import TrainableFeatures
from longrl.strategies.axis import SINGLE_RANK, world_axis
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel
from longrl.types import Continuation
from tests.distributed import run_distributed
from tests.tiny import assert_same_gradients, frames, gradients, vl_family


def shown(family, *keys):
    """A completion that was shown clips, on every rank the same."""
    media = tuple(replace(family.patch(frames(4, 56, 56, key)), is_whole=True) for key in keys)
    return Continuation(torch.zeros(0, dtype=torch.int64), media=media)


def test_what_an_earlier_step_has_encoded_is_found():
    family = vl_family()
    cache = FeatureCache(family)
    cache.add({"earlier": torch.ones(2, 3)})
    features = RolloutFeatures({"prompt": torch.zeros(1, 3)}, cache)
    assert "prompt" in features
    assert "earlier" in features
    assert "new" not in features
    features["new"] = torch.ones(1, 3)
    assert features.num_encoded == 1
    assert {*features} == {"prompt", "earlier", "new"}
    assert len(features) == 3
    assert {*features.shown} == {"earlier", "new"}
    assert cache.find("new") is None  # other ranks do not have it yet
    with pytest.raises(KeyError):
        features["other"]


def test_added_features_are_kept_before_older_ones():
    cache = FeatureCache(vl_family(), max_bytes=24)
    cache.add({"old": torch.zeros(1, 3)})
    cache.add({"new": torch.zeros(1, 3)})
    cache.add({"newer": torch.zeros(1, 3)})
    assert [cache.find(key) is None for key in ("old", "new", "newer")] == [True, False, False]


def on_two_ranks():
    world = world_axis()
    parallel = Parallel(world=world, dp=SINGLE_RANK, sp_group=world, num_gather_chunks=2)
    # 1. Rows of different numbers, some of which both have.
    local = [{"a": torch.full((3, 2), 1.0), "b": torch.full((1, 2), 2.0)}, {"b": torch.full((1, 2), 9.0)}][world.rank]
    if world.rank:
        local["c"] = torch.full((4, 2), 3.0)
    together = shared_features(local, torch.device("cpu"), parallel)
    nothing = shared_features({}, torch.device("cpu"), parallel)

    # 2. Whole media: each is encoded by one rank, in the bits and with the gradients of one that is alone.
    family = vl_family(freeze_vision_encoder=False)
    model = family.build()
    calls = []
    handle = family.media_encoders(model)[0].register_forward_hook(lambda *args: calls.append(1))
    clips = [shown(family, "x", "y", "z")]
    features = FeatureCache(family, parallel=parallel).get_or_encode(model, clips)
    handle.remove()
    alone = FeatureCache(family).get_or_encode(model, clips)
    same = all(torch.equal(features[key], alone[key]) for key in alone)

    found = []
    for grid in (parallel, SINGLE_RANK_GRID):
        model.zero_grad()
        trainable = TrainableFeatures(family, model, clips, grid)
        weights = {key: index + 1.0 for index, key in enumerate(trainable.leaves)}
        share = 1 / grid.sp_group.size  # each rank has a part of the loss
        sum(weights[key] * leaf.square().sum() * share for key, leaf in trainable.leaves.items()).backward()
        trainable.backward()
        found.append({name: grid.world.sum(grad) for name, grad in gradients(model).items()})
    assert_same_gradients(*found, 1e-5)
    return {key: rows.tolist() for key, rows in together.items()}, nothing, len(calls), same


def test_ranks_of_a_group_share_what_each_was_shown():
    (first, nothing, calls, same), (second, _, other_calls, other_same) = run_distributed(on_two_ranks, 2)
    assert first == second
    assert [*first] == [*second]
    assert first == {"a": [[1.0] * 2] * 3, "b": [[2.0] * 2], "c": [[3.0] * 2] * 4}
    assert nothing == {}
    assert (calls, other_calls) == (2, 1)  # three clips
    assert same
    assert other_same
