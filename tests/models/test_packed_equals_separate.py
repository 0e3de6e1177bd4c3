"""packed == separate: log-probs and every gradient against one plain transformers forward per completion."""

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.features.trainable_features import TrainableFeatures
from longrl.modules.policy import all_media
from longrl.packing.pack import pack
from tests.families import FAMILIES, TEXT, cell, every, proves
from tests.tiny import (
    assert_same_gradients,
    gradients,
    internvl_family,
    internvl_prompts,
    mixed_prompts,
    nvila_family,
    omni_family,
    omni_prompts,
    plain_model,
    qwen2_vl_family,
    qwen3_omni_family,
    qwen3_vl_family,
    random_completions,
    separate_logps,
    vila_family,
    vila_folder,
    vl_family,
)

LENGTHS = [[3, 7, 1, 4], [5], [2, 9]]


def packed_logps(family, model, prompts, completions, coefficients, max_tokens, trainable=True):
    """Log-probs of all tokens; leaves the gradient of their weighted sum on the model."""
    logps = torch.zeros(len(coefficients))
    media = all_media(prompts, completions)
    features = TrainableFeatures(family, model, media) if trainable else None
    read = features.leaves if features else FeatureCache(family).get_or_encode(model, media)
    for packed in pack(prompts, completions, max_tokens):
        output = family.forward(model, packed, read)
        logps[packed.token_index] = output.logp.detach()
        (output.logp * coefficients[packed.token_index]).sum().backward()
    if features:
        features.backward()
    return logps


def compare(family, prompts, max_tokens):
    model = family.build()
    completions = random_completions(family, LENGTHS)
    plain = plain_model(model, family)
    wanted = separate_logps(plain, prompts, completions)
    coefficients = torch.randn(len(wanted), generator=torch.Generator().manual_seed(1))
    (wanted * coefficients).sum().backward()
    found = packed_logps(family, model, prompts, completions, coefficients, max_tokens)
    assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()
    assert_same_gradients(gradients(model), gradients(plain), 1e-5)


@proves("same logits", "qwen2.5-vl")
@proves("shared prefix", "qwen2.5-vl")
@pytest.mark.parametrize("max_tokens", [60, 90, 10_000], ids=["one_at_a_time", "some", "all_together"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_video_and_images(max_tokens, checkpointing):
    family = vl_family(gradient_checkpointing=checkpointing)
    compare(family, mixed_prompts(family), max_tokens)


@proves("same logits", "qwen2-vl")
@proves("shared prefix", "qwen2-vl")
def test_qwen2_vl():
    family = qwen2_vl_family(gradient_checkpointing=True)
    compare(family, mixed_prompts(family), 90)


@pytest.mark.parametrize("max_tokens", [110, 10_000], ids=["one_at_a_time", "all_together"])
@pytest.mark.parametrize("pool", [1, cell("shared prefix", "longvila-r1", "by_length")])
@pytest.mark.parametrize("projector", ["mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"])
def test_vila(projector, pool, max_tokens):
    family = vila_family(vila_folder(projector=projector), pool_frames=pool, gradient_checkpointing=pool != 1)
    compare(family, mixed_prompts(family), max_tokens)


@proves("shared prefix", "nvila")
@pytest.mark.parametrize("max_tokens", [150, 10_000], ids=["some", "all_together"])
def test_vila_of_several_scales(max_tokens):
    family = nvila_family()
    compare(family, mixed_prompts(family), max_tokens)


@pytest.mark.parametrize("max_tokens", [250, 10_000], ids=["some", "all_together"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "experts", [cell("shared prefix", "qwen3-vl", False), cell("shared prefix", "qwen3-vl-moe", True)]
)
def test_qwen3_vl(max_tokens, checkpointing, experts):
    family = qwen3_vl_family(experts, gradient_checkpointing=checkpointing)
    compare(family, mixed_prompts(family), max_tokens)


@pytest.mark.parametrize(
    ("make", "max_tokens"),
    [
        pytest.param(make, max_tokens, marks=proves("shared prefix", name))
        for name, make, max_tokens in (
            ("qwen2.5-omni", omni_family, 400),
            ("qwen2.5-omni", omni_family, 10_000),
            ("qwen3-omni", qwen3_omni_family, 250),
            ("qwen3-omni", qwen3_omni_family, 10_000),
        )
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_qwen_omni(make, max_tokens, checkpointing):
    family = make(gradient_checkpointing=checkpointing)
    compare(family, omni_prompts(family), max_tokens)


@proves("shared prefix", "internvl3.5")
@pytest.mark.parametrize("max_tokens", [220, 10_000], ids=["some", "all_together"])
def test_internvl(max_tokens):
    family = internvl_family(gradient_checkpointing=max_tokens == 220)
    compare(family, internvl_prompts(family), max_tokens)


@pytest.mark.parametrize("frozen", ["freeze_vision_encoder", "freeze_audio_encoder"])
def test_one_of_two_towers_is_frozen(frozen):
    """The other one's gradients are those of a model in which both train."""
    results = []
    for family in (
        omni_family(),
        omni_family(**{"freeze_vision_encoder": False, "freeze_audio_encoder": False, frozen: True}),
    ):
        model, prompts = family.build(), omni_prompts(family)
        completions = random_completions(family, LENGTHS)
        packed_logps(family, model, prompts, completions, torch.ones(31), 10_000)
        results.append(gradients(model))
    vision_encoder = {"freeze_vision_encoder": "visual.", "freeze_audio_encoder": "audio_tower."}[frozen]
    kept = {name: grad for name, grad in results[0].items() if not name.startswith(vision_encoder)}
    assert len(kept) < len(results[0])
    assert_same_gradients(results[1], kept, 1e-6)


@every("shared prefix", [name for name in TEXT if name != "qwen3.5-text"])  # test_qwen3_5.py: decays have noise
@pytest.mark.parametrize("max_tokens", [150, 10_000])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_text(name, max_tokens, checkpointing):
    family = FAMILIES[name].make(gradient_checkpointing=checkpointing)
    compare(family, FAMILIES[name].prompts(family), max_tokens)


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family])
def test_a_frozen_tower_gives_the_same_text_gradients(make):
    trainable, frozen = make(), make(freeze_vision_encoder=True)
    results = []
    for family in (trainable, frozen):
        model, prompts = family.build(), mixed_prompts(family)
        completions = random_completions(family, LENGTHS)
        packed_logps(family, model, prompts, completions, torch.ones(31), 10_000, trainable=family is trainable)
        results.append(gradients(model))
    text = {name: grad for name, grad in results[0].items() if "visual" not in name}
    assert_same_gradients(results[1], text, 1e-6)
