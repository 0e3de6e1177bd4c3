"""Families that hear against transformers: its processors, positions and forward, from pixels and samples."""

import dataclasses
import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.packing.pack import pack
from longrl.types import FrameShard, SamplingParams
from tests.families import FAMILIES, cell
from tests.models.omni_cases import CASES, logits_of, rendered, theirs, with_biases
from tests.tiny import omni_family, omni_prompts, plain_model, qwen3_omni_family, row, sound

MAKE = {"qwen2.5-omni": omni_family, "qwen3-omni": qwen3_omni_family}
PIXELS = {"qwen2.5-omni": 4 * 28 * 28, "qwen3-omni": 4 * 32 * 32}
every = pytest.mark.parametrize("case", list(CASES))
both = pytest.mark.parametrize("kind", MAKE)
# Of its processor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@functools.cache
def family_with(kind):
    return MAKE[kind](max_pixels=PIXELS[kind])


@functools.cache
def models_of(kind):
    """Ours, and transformers' own with the same weights."""
    model = with_biases(family_with(kind).build())
    return model, plain_model(model, family_with(kind))


@both
@every
def test_ids_are_those_of_the_models_own_processor(kind, case):
    family, case = family_with(kind), CASES[case]
    assert rendered(family, case).input_ids.tolist() == theirs(family, case)["input_ids"][0].tolist()


@both
@every
def test_patches_and_spectrograms_are_those_of_the_models_own_processor(kind, case):
    family, case = family_with(kind), CASES[case]
    media, inputs = rendered(family, case).media, theirs(family, case)
    for name, values in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        if own := [item.patches for item in media if item.kind == name]:
            assert torch.equal(torch.cat(own), inputs[values])
    sounds = [item for item in media if item.kind == "audio"]
    for place, item in enumerate(sounds):
        heard = inputs["feature_attention_mask"][place].bool()
        torch.testing.assert_close(item.patches, inputs["input_features"][place][:, heard].T, rtol=0, atol=2e-6)


@both
@every
def test_positions_are_those_of_the_model(kind, case):
    """Of Qwen3-Omni to the rounding of transformers' sums in float32."""
    family, case = family_with(kind), CASES[case]
    prompt, inputs = rendered(family, case), theirs(family, case)
    mask = inputs.get("feature_attention_mask")
    wanted, _ = models_of(kind)[1].get_rope_index(
        inputs["input_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
        case.tracks,
        None if mask is None else mask.sum(1),
        inputs.get("video_second_per_grid"),
    )
    is_whole = case.spacing != 0.713 or kind == "qwen2.5-omni"
    tolerance = 0 if is_whole else 5e-5
    torch.testing.assert_close(prompt.position_ids.float(), wanted[:, 0].float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [cell("same logits", name) for name in MAKE])
@every
def test_logits_are_those_of_transformers_from_pixels_and_samples(kind, case):
    """Its own processor, positions and forward, of every token of the prompt."""
    family, case = family_with(kind), CASES[case]
    (model, plain), prompt = models_of(kind), rendered(family, case)
    wanted = plain(**theirs(family, case)).logits[0]
    torch.testing.assert_close(logits_of(family, model, prompt), wanted, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("case", ["sound", "track", "longer track", "shorter track", "two tracks", "uneven rate"])
def test_greedy_tokens_are_those_of_generate(kind, case):
    family, case = family_with(kind), CASES[case]
    (model, plain), prompt, inputs = models_of(kind), rendered(family, case), theirs(family, case)
    features = FeatureCache(family).get_or_encode(model, [prompt])
    ((found,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 12, 0.0), seed=0)
    eos = family.tokenizer.eos_token_id
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": eos}
    wanted = plain.generate(**inputs, **options)
    assert found.token_ids.tolist() == wanted[0, inputs["input_ids"].shape[1] :].tolist()


# ---- features ----


@both
@pytest.mark.parametrize("seconds", [0.1, 1.99, 2.0, 2.01, 2.02, 2.03, 6.77, 12.0])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_a_sound_by_windows(kind, seconds, size):
    """What each rank's windows give, laid end to end, is what the encoder makes of the whole."""
    family = MAKE[kind]()
    model, whole = with_biases(family.build()), sound(seconds)
    (wanted,) = family.encode_media(model, [family.patch(whole)])
    parts = []
    for rank in range(size):
        media = family.patch(dataclasses.replace(whole, shard=FrameShard(rank, size)))
        count = len(FrameShard(rank, size).temporal_patches(media.grid_thw[0]))
        parts += family.encode_media(model, [media.part(count)]) if count else []
    assert len(wanted) == family.num_features(family.patch(whole))
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-5, atol=1e-6)


@both
def test_cutting_a_long_sound_between_windows_changes_nothing(kind):
    family = MAKE[kind]()
    model, media = with_biases(family.build()), [family.patch(sound(9.3))]
    (whole,) = family.encode_media(model, media)
    family.max_patches_per_encode = 450
    (cut,) = family.encode_media(model, media)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


@both
def test_every_kind_of_medium_reaches_the_log_probabilities(kind):
    family = MAKE[kind]()
    model, prompts = family.build(), omni_prompts(family)[:1]
    features = FeatureCache(family).get_or_encode(model, prompts)
    (packed,) = pack(prompts, [[torch.arange(5)]], 10_000)
    with torch.no_grad():
        whole = family.forward(model, packed, features).logp
        for item in prompts[0].media:
            without = features | {item.key: torch.zeros_like(features[item.key])}
            assert float((family.forward(model, packed, without).logp - whole).abs().max()) > 1e-5, item.kind


@both
@pytest.mark.parametrize("seconds", [0.3, 1.98, 2.0, 5.3])
def test_a_plan_counts_the_tokens_of_a_track(kind, seconds):
    family = MAKE[kind](use_audio_in_video=True)
    assert family.sound_tokens(seconds) == family.num_features(family.patch(sound(seconds))) + 2
    assert MAKE[kind]().sound_tokens(seconds) == 0


# ---- folders ----


@both
def test_a_released_folder_and_a_thinker_alone_are_the_same_model(kind, tmp_path):
    """Written as the thinker alone; read from there, and from a folder with `thinker.` names and others beside it."""
    family = MAKE[kind]()
    model, whole, thinker = family.build(), tmp_path / "whole", tmp_path / "thinker"
    family.export(model, thinker)
    weights = {f"thinker.{name}": value for name, value in load_file(thinker / "model.safetensors").items()}
    family.processor.save_pretrained(whole)
    shutil.copy(f"{family.model_path}/config.json", whole)
    others = {"talker.model.norm.weight": torch.ones(3)}
    others |= {f"{prefix}x.weight": torch.ones(2) for prefix in family.ignored_weight_prefixes}
    save_file(weights | others, whole / "model.safetensors", metadata={"format": "pt"})
    for folder in (thinker, whole):
        loaded = type(family)(str(folder), min_pixels=family.min_pixels, max_pixels=family.max_pixels)
        assert loaded.config.model_type in family.model_types
        state = loaded.build().state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        prompt = loaded.render(row(), "<audio>?", [sound(1.0)])
        assert torch.equal(prompt.input_ids, family.render(row(), "<audio>?", [sound(1.0)]).input_ids)


@both
def test_transformers_loads_what_is_written(kind, tmp_path):
    family = MAKE[kind]()
    model = family.build()
    family.save_weights(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_families_are_those_of_the_table():
    assert {name for name, tested in FAMILIES.items() if tested.prompts is omni_prompts} == MAKE.keys()
