"""InternVL3.5 against transformers' own processor and class: tiles, frames in words, features, log-probabilities."""

import json

import pytest
import torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.internvl import InternVLFamily, text_model
from longrl.packing.pack import pack
from longrl.testing.tiny import SIZES, tiny_internvl
from longrl.types import SamplingParams, UnusableSample
from tests.families import proves
from tests.tiny import frames, internvl_family, internvl_folder, random_completions, row

TEXT = "Look at<video> <image>then\n<image><video>and <image>. What comes next?"
PARTS = ["Look at", "video", " ", "image", "then\n", "image", "video", "and ", "image", ". What comes next?"]
STACKS = ["qwen3", "qwen2", "qwen3_moe"]


def media():
    """Two videos of one length, for the processor takes no others; images of one, three and four tiles."""
    return [
        frames(5, 60, 90, "v1"), frames(1, 40, 40, "i1", "image"), frames(1, 150, 47, "i2", "image"),
        frames(5, 113, 87, "v2"), frames(1, 120, 121, "i3", "image"),
    ]  # fmt: skip


def family_of(model_type, tmp_path):
    if model_type == "qwen3":
        return internvl_family()
    text = SIZES["qwen3_experts"] if model_type == "qwen3_moe" else {}
    folder = tiny_internvl(tmp_path, text=text, model_type=model_type)
    return InternVLFamily(str(folder), random_init=True, max_tiles=4)


def theirs(family, parts, pixels):
    """The processor's inputs for the same chat."""
    content = [{"type": part} if part in ("video", "image") else {"type": "text", "text": part} for part in parts]
    text = family.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    shown = {f"{kind}s": [item.pixels for item in pixels if item.kind == kind] for kind in ("image", "video")}
    shown["images"] = [item[0] for item in shown["images"]]
    return family.processor(
        text=[text], return_tensors="pt", images_kwargs={"max_patches": family.max_tiles},
        **{name: value for name, value in shown.items() if value},
    )  # fmt: skip


def model_of(family, model):
    """Stock transformers with the same weights, read from the folder's config."""
    config = family.read_config(family.model_path)
    plain = InternVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return plain


# ---- prompts and pixels ----


@pytest.mark.parametrize(
    ("text", "parts", "count"),
    [
        (TEXT, PARTS, 5),
        ("What?", ["video", "What?"], 1),
        ("no media here", ["no media here"], 0),
    ],
    ids=["mixed", "video", "text"],
)
def test_prompt_and_tiles_equal_the_processors(text, parts, count):
    """Words right before a frame's are tokenized with them, as there."""
    family, pixels = internvl_family(), media()[:count]
    prompt, wanted = family.render(row(), text, pixels), theirs(family, parts, pixels)
    assert prompt.input_ids.tolist() == wanted["input_ids"][0].tolist()
    if count:
        tiles = torch.cat([item.patches for item in prompt.media]).unflatten(1, (3, 56, 56))
        assert torch.equal(tiles, wanted["pixel_values"])
        assert len(prompt.input_ids[prompt.input_ids == family.config.image_token_id]) == 4 * len(tiles)


@pytest.mark.parametrize("max_tiles", [1, 4, 12])
@pytest.mark.parametrize("size", [(56, 56), (40, 77), (17, 300), (300, 17), (113, 113), (224, 168), (480, 640)])
def test_an_image_has_the_tiles_of_the_processor(size, max_tiles):
    family = internvl_family(max_tiles=max_tiles)
    options = {"crop_to_patches": True, "max_patches": max_tiles}
    wanted = family.processor.image_processor.get_number_of_image_patches(*size, options)
    item = family.patch(frames(1, *size, "i", "image"))
    assert len(item.patches) == wanted
    assert family.num_features(item) == 4 * wanted


def test_frames_stand_behind_their_numbers():
    family = internvl_family()
    text = family.tokenizer.decode(family.render(row(), "<video>Which?", [frames(2, 30, 30)]).input_ids)
    tile = "<img>" + 4 * "<IMG_CONTEXT>" + "</img>"
    assert f"user\nFrame1: {tile}\nFrame2: {tile}\nWhich?" in text


def test_a_template_that_marks_other_media_is_told(tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    family = internvl_family(chat_template_file=str(template))
    with pytest.raises(UnusableSample, match=r"must write <IMG_CONTEXT> for each image and <video> for each video"):
        family.render(row(), "<video>Which?", [frames(2, 30, 30)])


def test_words_around_frames_are_counted_for_a_plan():
    """With a token for every digit and for `Frame`, as Qwen's tokenizer has them."""
    family = internvl_family()
    (item,) = family.render(row(), "", [frames(12, 30, 30)]).media
    words = family.media_text("<video>", [item]).replace("<IMG_CONTEXT>", "")
    pieces = words.replace("Frame", "F").replace("<img>", "<").replace("</img>", ">")
    assert family.time_tokens(item.timestamps) == len(pieces)


# ---- the model ----


@proves("same logits", "internvl3.5")
@pytest.mark.parametrize("model_type", STACKS)
def test_log_probabilities_and_tokens_equal_transformers_from_pixels(model_type, tmp_path):
    """Its processor and its forward; our prompt, features and packed forward. A dense Qwen3, Qwen2.5, and experts."""
    family = family_of(model_type, tmp_path)
    model = family.build()
    plain, inputs = model_of(family, model), dict(theirs(family, PARTS, media()))
    prompt, (answers,) = family.render(row(), TEXT, media()), random_completions(family, [[6, 3]])
    features = FeatureCache(family).get_or_encode(model, [prompt])
    (packed,) = pack([prompt], [answers], 10_000)
    with torch.no_grad():
        rows = plain.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        found = family.forward(model, packed, features).logp
        wanted = torch.cat([answer_logps(plain, inputs, answer) for answer in answers])
        ((greedy,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 8, 0.0), seed=0)
        eos = family.tokenizer.eos_token_id
        going_on = plain.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    torch.testing.assert_close(torch.cat([features[item.key] for item in prompt.media]), rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert greedy.token_ids.tolist() == going_on[0, inputs["input_ids"].shape[1] :].tolist()


def answer_logps(plain, inputs, answer):
    """[S] of one completion behind the prompt, in an ordinary forward pass."""
    ids = torch.cat([inputs["input_ids"], answer[None]], 1)
    logits = plain(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def test_tiles_are_encoded_in_calls_of_a_bounded_size():
    whole, few = internvl_family(), internvl_family(max_tiles_per_encode=3)
    model, prompt = whole.build(), whole.render(row(), TEXT, media())
    calls = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    with torch.no_grad():
        wanted, found = (family.encode_media(model, prompt.media) for family in (whole, few))
    assert calls == [5, 1, 4, 5, 5, 3, 2, 1, 3, 1, 3, 2, 3, 2]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert whole.encode_media(model, []) == []


# ---- folders ----


def test_the_text_models_word_on_tying_counts(tmp_path):
    """Released configs say nothing of it at the top, where transformers 5.19 takes true for granted."""
    folder = tiny_internvl(tmp_path, text={"tie_word_embeddings": False})
    values = json.loads((folder / "config.json").read_text())
    values.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(values))
    model = InternVLFamily(str(folder), random_init=True).build()
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_the_layout_of_its_own_code_is_refused_with_the_one_to_take(tmp_path):
    values = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "configuration.py").write_text("raise RuntimeError('this code must not run')\n")
    with pytest.raises(ValueError, match=r"never run here; name .*OpenGVLab/InternVL3_5-8B-HF instead of"):
        InternVLFamily(str(tmp_path)).build()


def test_features_of_another_layer_are_refused(tmp_path):
    folder = tiny_internvl(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vision_feature_layer": -2}))
    with pytest.raises(ValueError, match=r"\(-2, 'default'\), and InternVLFamily reads the last layer's patches"):
        InternVLFamily(str(folder), random_init=True).build()


def test_embeddings_that_change_with_the_longest_sequence_are_warned_of(tmp_path, caplog):
    """InternVL3's, beyond the positions it was trained on."""
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}
    InternVLFamily(str(tiny_internvl(tmp_path, text=rope, model_type="qwen2")), random_init=True).build()
    assert "change beyond 32768 positions with the longest sequence of a micro-batch" in caplog.text


# ---- the engine's side ----


def test_the_engine_is_given_the_text_stack():
    family = internvl_family()
    model = family.build()
    names = {family.engine_weight(name) for name in model.state_dict()} - {None}
    config = text_model(family.read_config(internvl_folder()))
    assert config.architectures == ["Qwen3ForCausalLM"]
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    assert names == wanted.keys()
    assert AutoTokenizer.from_pretrained(family.text_folder()).get_vocab() == family.tokenizer.get_vocab()


def test_an_engine_that_reads_experts_one_by_one_does_not_start(tmp_path):
    family = family_of("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match=r"has 4 experts; use engine: longrl.engines.hf.HFEngine"):
        family.engine_options()
