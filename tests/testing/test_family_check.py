"""`check_family` on families of longrl and on two from outside; a wrong hook is found, and named."""

import dataclasses

import pytest
import torch

from examples.new_family.my_family import MistralFamily, SquareInternVLFamily as InternVLFamily
from examples.new_family.tiny_models import media_inputs as internvl_inputs, tiny_internvl, tiny_mistral
from longrl.testing import check_family
from longrl.testing.family_check import CLAIMS, NOT_RUN
from tests.families import FAMILIES
from tests.models.plain_vila import PlainVila
from tests.tiny import internvl_media_inputs, vila_media_inputs


def plain_options(name):
    """VILA is no model of transformers: tests have one that joins its parts by hand. InternVL takes tiles alone."""
    if "internvl" in name:
        return {"media_inputs": internvl_media_inputs}
    if "vila" not in name:
        return {}
    return {"plain_model": PlainVila.of, "media_inputs": vila_media_inputs}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "qwen2.5-vl", "qwen3.5", "qwen3-omni", "internvl3.5", "nvila"])
def test_families_of_every_kind_pass(name):
    """Text alone, windows, states, sound and experts, tiles, another layout; docs/families.md proves the others."""
    report = check_family(FAMILIES[name].make(), **plain_options(name))
    assert report.checked.keys() | report.skipped.keys() == CLAIMS.keys() | NOT_RUN.keys()
    reads_text = {"patches", "features", "cached features"}
    assert report.skipped.keys() - NOT_RUN.keys() == (
        reads_text if not FAMILIES[name].make().media_token_ids() else set()
    )


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_language_model_from_outside_passes(tmp_path, num_ranks):
    report = check_family(MistralFamily(str(tiny_mistral(tmp_path)), random_init=True), num_ranks=num_ranks)
    assert report.skipped.keys() - NOT_RUN.keys() == {"patches", "features", "cached features"} | (
        {"SP"} if num_ranks == 1 else set()
    )
    assert "MistralFamily:\n  identity: plain values" in str(report)
    for claim in ("training from YAML", "RL", "released files", "vLLM"):
        assert f"\n  {claim}: not checked, it " in str(report) or f"\n  {claim}: not checked, the model" in str(report)
    assert "patches: not checked, it reads no images or videos" in str(report)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_vision_model_from_outside_passes(tmp_path, num_ranks):
    family = InternVLFamily(str(tiny_internvl(tmp_path)), random_init=True)
    report = check_family(family, media_inputs=internvl_inputs, num_ranks=num_ranks)
    assert report.skipped.keys() - NOT_RUN.keys() == {"planning sizes"} | ({"SP"} if num_ranks == 1 else set())


class WrongPositions(MistralFamily):
    def position_ids(self, input_ids, media):
        return super().position_ids(input_ids, media) * 2


class OneName(MistralFamily):
    def engine_weight(self, name):
        return "weight"


class AnyObject(MistralFamily):
    def identity(self):
        return super().identity() | {"option": object()}


class TrainingOption(MistralFamily):
    answer_options = ("gradient_checkpointing",)


class LeftOut(MistralFamily):
    def __init__(self, model, words=3, **kwargs):
        super().__init__(model, **kwargs)
        self.words = words

    def identity(self):
        return {name: value for name, value in super().identity().items() if name != "words"}


class ShownElsewhere(MistralFamily):
    def observation(self, *args, **kwargs):
        observed = super().observation(*args, **kwargs)
        return dataclasses.replace(observed, position_ids=observed.position_ids + 1)


class NoEnd(MistralFamily):
    def encode_response(self, response):
        return super().encode_response(response)[:-1]


class ForgetsWeights(MistralFamily):
    def save_weights(self, model, folder):
        with torch.no_grad():
            model.lm_head.weight += 1
            super().save_weights(model, folder)
            model.lm_head.weight -= 1


class MoreFeatures(InternVLFamily):
    def num_features(self, media):
        return super().num_features(media) + 1


class NeedsPixels(InternVLFamily):
    def grid(self, num_frames, height, width, **options):
        return num_frames, height // 7, width // 7


class EncodesOtherwise(InternVLFamily):
    def encode_media(self, model, media):
        return [2 * features for features in super().encode_media(model, media)]


class ProjectsItemByItem(InternVLFamily):
    def encode_media(self, model, media):
        return [super(ProjectsItemByItem, self).encode_media(model, [item])[0] for item in media]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (WrongPositions, r"fails 'same logits': .*\n  TextStack .*\n  RendersPrompts .* its own position_ids\n"),
        (OneName, r"fails 'engine': two weights have one name.*\n  EngineAdapter .* its own engine_weight\n"),
        (AnyObject, r"fails 'identity': .*JSON.*\n  RendersPrompts .* its own identity\n"),
        (TrainingOption, r"fails 'identity': gradient_checkpointing must not be in identity"),
        (LeftOut, r"fails 'identity': words must be in identity\(\), or in training_options"),
        (ShownElsewhere, r"fails 'observations': positions .*\n.*\n  RendersPrompts .* its own observation\n"),
        (NoEnd, r"fails 'SFT': a response must end.*\n  RendersPrompts .* its own encode_response\n"),
        (ForgetsWeights, r"fails 'export': .* other bits of .*\n  BuildsModel .* save_weights"),
        (MoreFeatures, r"fails 'features': features of video .*\n(.*\n)*  PatchesMedia .* its own .*num_features"),
        (NeedsPixels, r"fails 'features': features of video .*\n(.*\n)*  PatchesMedia .* its own grid"),
        (ProjectsItemByItem, r"fails 'features': .*Projector runs 4 times behind another encoder for 4 media"),
        (EncodesOtherwise, r"fails 'same logits': .*\n(.*\n)*  EncodesMedia .* its own .*encode_media"),
    ],
)
def test_a_wrong_hook_is_found_and_named(tmp_path, family, message):
    folder = tiny_internvl(tmp_path) if issubclass(family, InternVLFamily) else tiny_mistral(tmp_path)
    options = {"media_inputs": internvl_inputs} if issubclass(family, InternVLFamily) else {}
    with pytest.raises(AssertionError, match=message):
        check_family(family(str(folder), random_init=True), num_ranks=1, **options)
