from longrl.features.cache import distinct_media
from longrl.features.trainable_features import TrainableFeatures
from longrl.packing.pack import pack
from tests.tiny import assert_same_gradients, frames, gradients, random_completions, row, vl_family


def prompt(family, *keys, size=56):
    return family.render(row("+".join(keys)), "What?", [frames(4, size, size, key) for key in keys])


def loss_of(family, model, packed, features):
    return family.forward(model, packed, features).logp.sum()


def test_gradients_through_leaves_are_those_of_a_direct_backward():
    """Over several micro-batches, with media that several prompts share."""
    family = vl_family(freeze_vision_encoder=False)
    prompts = [prompt(family, "a", "b"), prompt(family, "b"), prompt(family, "a")]
    micro_batches = pack(prompts, random_completions(family, [[3, 4], [5], [2]]), max_tokens=60)
    assert len(micro_batches) > 1

    direct = family.build()
    media = distinct_media(prompts)
    features = dict(zip([item.key for item in media], family.encode_media(direct, media), strict=True))
    sum(loss_of(family, direct, packed, features) for packed in micro_batches).backward()

    model = family.build()
    calls = []
    family.media_encoders(model)[0].register_forward_hook(lambda *args: calls.append(1))
    leaves = TrainableFeatures(family, model, prompts)
    for packed in micro_batches:
        loss_of(family, model, packed, leaves.leaves).backward()
    leaves.backward()
    assert len(calls) == 1
    assert_same_gradients(gradients(model), gradients(direct), 1e-5)
    assert any("visual" in name for name in gradients(model))


def test_media_that_no_micro_batch_used_give_no_gradient():
    family = vl_family(freeze_vision_encoder=False)
    model = family.build()
    used, unused = prompt(family, "a"), prompt(family, "b")
    features = TrainableFeatures(family, model, [used, unused])
    (packed,) = pack([used], random_completions(family, [[3]]), 10_000)
    loss_of(family, model, packed, features.leaves).backward()
    features.backward()
    found = gradients(model)
    model.zero_grad()
    alone = TrainableFeatures(family, model, [used])
    loss_of(family, model, packed, alone.leaves).backward()
    alone.backward()
    assert_same_gradients(found, gradients(model), 1e-6)


def test_nothing_used_is_no_backward():
    family = vl_family(freeze_vision_encoder=False)
    model = family.build()
    TrainableFeatures(family, model, [prompt(family, "a")]).backward()
    TrainableFeatures(family, model, []).backward()
    assert gradients(model) == {}
