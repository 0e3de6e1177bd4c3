"""Features from disk in every family that has any: mixed media, read by a second run whose encoders never run."""

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.packing.pack import pack
from tests.families import FAMILIES, SEEING, every
from tests.tiny import random_completions


def from_disk(family, folder):
    return FeatureCache(family, disk=DiskCache(family, str(folder), 1 << 40))


def frozen(name):
    projector = {"freeze_projector": True} if "vila" in name or "internvl" in name else {}
    return FAMILIES[name].make(freeze_vision_encoder=True, **projector)


@every("cached features", SEEING)
def test_features_from_disk_are_the_towers_and_give_the_same_scores(name, tmp_path):
    family = frozen(name)
    model, prompts = family.build(), FAMILIES[name].prompts(family)
    fresh = FeatureCache(family).get_or_encode(model, prompts)
    from_disk(family, tmp_path).get_or_encode(model, prompts)
    for encoder in family.media_encoders(model):
        encoder.register_forward_pre_hook(lambda *_: pytest.fail("an encoder ran"))
    found = from_disk(family, tmp_path).get_or_encode(model, prompts)
    assert found.keys() == fresh.keys()
    assert len(fresh) == len({item.key for prompt in prompts for item in prompt.media}) >= 4
    assert all(torch.equal(found[key], fresh[key]) for key in fresh)
    (packed,) = pack(prompts, random_completions(family, [[3, 5]] * len(prompts)), 10_000)
    with torch.no_grad():
        scores = [family.forward(model, packed, features).logp for features in (fresh, found)]
    assert torch.equal(*scores)
