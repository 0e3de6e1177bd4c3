import pytest
import torch

from longrl.features.cache import FeatureCache, distinct_media
from tests.tiny import frames, row, text_family, vl_family


def prompt(family, *keys, size=56):
    return family.render(row("+".join(keys)), "What?", [frames(4, size, size, key) for key in keys])


@pytest.fixture
def family():
    return vl_family(freeze_vision_encoder=True)


def setup(family, **options):
    return family.build(), FeatureCache(family, **options)


def bytes_of(cache):
    return sum(tensor.nbytes for tensor in cache._features.values())


def test_each_key_is_encoded_once(family):
    model, cache = setup(family)
    one, two = prompt(family, "a", "b"), prompt(family, "b", "c")
    found = cache.get_or_encode(model, [one, two, one])
    assert list(found) == [media.key for media in (*one.media, two.media[1])]
    assert (cache.num_requested, cache.num_encoded) == (3, 3)
    again = cache.get_or_encode(model, [two])
    assert (cache.num_requested, cache.num_encoded) == (5, 3)
    assert all(again[key] is found[key] for key in again)


def test_features_are_the_familys_without_gradient():
    family = vl_family(freeze_vision_encoder=False)
    model, cache = setup(family)
    item = prompt(family, "a")
    (found,) = cache.get_or_encode(model, [item]).values()
    (wanted,) = family.encode_media(model, item.media)
    assert wanted.requires_grad
    assert not found.requires_grad
    assert torch.equal(found, wanted)
    assert found.shape == (family.num_features(item.media[0]), 48)


def test_a_feature_does_not_depend_on_what_else_is_encoded(family):
    """Else a resumed run, whose cache is empty, would differ in the last bit."""
    model, _ = setup(family)
    prompts = [
        family.render(row(str(place)), "What?", [frames(count, height, width, str(place))])
        for place, (count, height, width) in enumerate([(5, 60, 90), (8, 112, 112), (3, 56, 56), (2, 224, 300)])
    ]
    together = FeatureCache(family).get_or_encode(model, prompts)
    for item in prompts:
        for key, alone in FeatureCache(family).get_or_encode(model, [item]).items():
            assert torch.equal(together[key], alone)


def test_the_least_recently_used_go_first(family):
    model, cache = setup(family)
    a, b, c, d = (prompt(family, key) for key in "abcd")
    cache.get_or_encode(model, [a, b, c])
    cache.max_bytes = bytes_of(cache)  # room for three
    cache.get_or_encode(model, [a])  # now b is the oldest
    cache.get_or_encode(model, [d])
    assert list(cache._features) == [item.media[0].key for item in (c, a, d)]
    cache.get_or_encode(model, [a, c, d])
    assert cache.num_encoded == 4
    cache.get_or_encode(model, [b])
    assert cache.num_encoded == 5


def test_features_of_the_current_call_stay_whatever_their_size(family):
    model, cache = setup(family, max_bytes=0)
    prompts = [prompt(family, key) for key in "abc"]
    found = cache.get_or_encode(model, prompts)
    assert len(found) == len(cache._features) == 3
    cache.get_or_encode(model, prompts[:2])
    assert cache.num_encoded == 3
    assert len(cache._features) == 2


def test_clear_forgets(family):
    model, cache = setup(family)
    item = prompt(family, "a")
    before = cache.get_or_encode(model, [item])[item.media[0].key]
    with torch.no_grad():
        for parameter in family.media_encoders(model)[0].parameters():
            parameter += 0.1
    assert torch.equal(cache.get_or_encode(model, [item])[item.media[0].key], before)
    cache.clear()
    assert not torch.equal(cache.get_or_encode(model, [item])[item.media[0].key], before)
    assert cache.num_encoded == 2


def test_text_has_no_features():
    family = text_family()
    model, cache = setup(family)
    assert cache.get_or_encode(model, [family.render(row(), "x")]) == {}
    assert cache.get_or_encode(model, []) == {}


def test_distinct_media_are_in_the_order_met(family):
    prompts = [prompt(family, "b", "a"), prompt(family, "a", "c")]
    assert [media.key[0] for media in distinct_media(prompts)] == ["b", "a", "c"]
