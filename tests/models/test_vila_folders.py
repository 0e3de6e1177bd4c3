"""VILA's folders as released: read, written and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longrl.models.vila import VilaFamily
from longrl.modules.initial_weights import build_from
from longrl.testing.tiny import tiny_vila
from tests.families import cell
from tests.tiny import frames, row, vila_folder

RELEASED = {
    "mm_projector": ["layers.1.bias", "layers.1.weight", "layers.2.bias", "layers.2.weight", "layers.4.bias",
                     "layers.4.weight"],
    "vision_tower": ["vision_model.embeddings.patch_embedding.bias", "vision_model.embeddings.patch_embedding.weight",
                     "vision_model.embeddings.position_embedding.weight", "vision_model.post_layernorm.bias",
                     "vision_model.post_layernorm.weight"]
    + [f"vision_model.encoder.layers.{n}.{part}.{kind}" for n in range(3) for kind in ("weight", "bias")
       for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj",
                    "self_attn.v_proj", "self_attn.out_proj")],
    "llm": ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    + [f"model.layers.{n}.{part}" for n in range(2)
       for part in ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight",
                    "mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.o_proj.weight",
                    *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")))],
}  # fmt: skip
"""Names in model.safetensors of each part, as transformers 4 wrote them and NVILA-8B has them, at 3 and 2 layers."""

NVILA_8B = {
    "architectures": ["LlavaLlamaModel"], "chat_template": None, "drop_path_rate": 0.0, "dynamic_s2": True, "fps": 0.0,
    "hidden_size": 48, "image_aspect_ratio": "dynamic_s2", "interpolate_mode": "linear", "mm_hidden_size": 96,
    "mm_projector_lr": None, "mm_use_im_patch_token": True, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -2, "model_dtype": "torch.bfloat16",
    "model_type": "llava_llama", "num_time_tokens": 0, "num_video_frames": 8, "resume_path": "runs/train/x/model",
    "s2": False, "s2_max_split_size": 56, "s2_resize_output_to_scale_idx": -1, "s2_scales": "56,112,168",
    "soft_ce_std": 1.0, "time_token_format": "<t{t}>", "time_token_ids": [], "transformers_version": "4.46.0",
    "tune_language_model": True, "tune_mm_projector": True, "tune_vision_tower": True, "vision_resolution": -1,
}  # fmt: skip
"""All fields of NVILA-8B's config.json beside its parts, widths and scales reduced."""


LONGVILA_R1 = {
    "architectures": ["VILAForCausalLM"], "chat_template": None, "drop_path_rate": 0.0, "dynamic_s2": False, "fps": 0.0,
    "hidden_size": 48, "image_aspect_ratio": "resize", "image_encoder": {"_target_": "llava.model.encoders."
    "BasicImageEncoder"}, "interpolate_mode": "linear", "mm_hidden_size": 32, "mm_projector_lr": None,
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "cls_patch",
    "mm_vision_select_layer": -2, "model_dtype": "torch.bfloat16", "model_type": "vila", "num_time_tokens": 0,
    "num_video_frames": 256, "s2": False, "video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder"},
    "vision_resolution": -1,
}  # fmt: skip
"""Fields of the code that is released with LongVILA-R1-7B (its VILAConfig, whose video encoder has no sizes), with the
values of LongVILA's training script where that sets them."""
RELEASED_CONFIGS = {"nvila": (NVILA_8B, "mlp_downsample"), "longvila-r1": (LONGVILA_R1, "mlp_downsample_2x2_fix")}


@pytest.fixture(params=RELEASED_CONFIGS)
def released(request, tmp_path):
    """A folder whose files have the names and fields of a released model, with random weights."""
    fields, projector = RELEASED_CONFIGS[request.param]
    folder = tiny_vila(tmp_path / "released", projector=projector, text={"tie_word_embeddings": False})
    parts = {name: json.loads((folder / name / "config.json").read_text()) for name in RELEASED}
    llm = parts["llm"]
    llm |= {"rope_theta": llm.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "torch_dtype": "float32",
            "model_max_length": 8192, "tokenizer_padding_side": "right", "max_window_layers": 28}  # fmt: skip
    parts["vision_tower"] |= {"num_image_tokens": 256, "projection_dim": 2048, "projector_hidden_act": "gelu_fast"}
    for name, config in parts.items():
        config.pop("transformers_version", None)
        (folder / name / "config.json").write_text(json.dumps(config | {"_name_or_path": f"runs/train/x/model/{name}"}))
    top = fields | {f"{name}_cfg": config for name, config in parts.items()}
    (folder / "config.json").write_text(json.dumps(top))
    model = VilaFamily(str(folder), random_init=True).build()
    states = {"llm": model.llm.state_dict(), "mm_projector": model.mm_projector.state_dict()}
    states["vision_tower"] = {f"vision_model.{key}": value for key, value in model.vision_tower.state_dict().items()}
    for name, state in states.items():
        assert sorted(state) == sorted(RELEASED[name])
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    return folder, model.state_dict()


@pytest.mark.parametrize("released", [cell("released files", name) for name in RELEASED_CONFIGS], indirect=True)
def test_a_released_folder_is_read_and_written_again_bit_by_bit(released, tmp_path):
    folder, state = released
    family = VilaFamily(str(folder))
    model = family.build()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    written = tmp_path / "written"
    model.save_pretrained(written)
    family.save_processing(written)
    for name, keys in RELEASED.items():
        with safe_open(written / name / "model.safetensors", "pt") as file:
            assert sorted(file.keys()) == sorted(keys)
    again = VilaFamily(str(written))
    assert all(torch.equal(value, state[name]) for name, value in again.build().state_dict().items())
    fields, config = (json.loads((place / "config.json").read_text()) for place in (folder, written))
    assert config.keys() == fields.keys()
    assert all(config[key] == value for key, value in fields.items() if not key.endswith("_cfg"))
    assert again.config.preprocessor == family.config.preprocessor
    prompts = [one.render(row(), "what?", [frames(3, 60, 90)]) for one in (family, again)]
    assert torch.equal(prompts[0].input_ids, prompts[1].input_ids)
    assert AutoModelForCausalLM.from_pretrained(written / "llm").config.model_type == "qwen2"


def test_a_template_of_the_folder_replaces_the_tokenizers(tmp_path):
    folder = tiny_vila(tmp_path / "one", chat_template="plain")
    template = "{%- for message in messages %}\n    {{ message['content'] + '\\n' }}\n{% endfor %}\n"
    (folder / "plain.jinja").write_text(template)
    family = VilaFamily(str(folder), random_init=True)
    written = tmp_path / "two"
    family.build().save_pretrained(written)
    family.save_processing(written)
    for one in (family, VilaFamily(str(written))):
        prompt = one.render(row(), "what?", [frames(1)])
        assert one.tokenizer.decode(prompt.input_ids) == "<vila/video>" * 4 + "\nwhat?\n"


def test_a_run_may_start_from_an_exported_folder(released):
    folder, state = released
    family = VilaFamily(str(folder), random_init=True)
    found = build_from(family, str(folder)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.mark.parametrize("part", list(RELEASED))
def test_missing_unknown_and_misshapen_weights_are_named(released, part):
    folder, _ = released
    file = folder / part / "model.safetensors"
    state = load_file(file)
    lost, changed = sorted(state)[0], sorted(state)[-1]
    state["surplus.weight"] = state.pop(lost)
    state[changed] = torch.zeros(*state[changed].shape, 2)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} does not hold the weights .*\(3 differences\)") as error:
        VilaFamily(str(folder)).build()
    short = [name.removeprefix("vision_model.") for name in (lost, changed)]
    assert f"{short[0]} is missing" in str(error.value)
    assert f"{short[1]} is [" in str(error.value)
    assert "surplus.weight is unknown" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio must be None or 'resize' or 'dynamic'.*got 'pad'"),
        ({"mm_vision_select_feature": "patch"}, "mm_vision_select_feature must be 'cls_patch'.*got 'patch'"),
        ({"s2": True}, "s2 must be False"),
        ({"video_max_tiles": 4}, "video_max_tiles must be 1"),
        ({"chat_template": "qwen2"}, "qwen2.jinja does not exist; put the template there"),
        ({"video_encoder": '{"_target_": "x.TSPVideoEncoder", "pool_sizes": [[1, 3, 3]]}'}, r"pool_sizes=\[1, 3, 3\]"),
        ({"video_encoder": '{"_target_": "x.TSPVideoEncoder", "pool_sizes": [[2, 1, 1], [1, 2, 2]]}'}, "one size"),
        ({"video_encoder": '{"_target_": "x.TimeEncoder"}'}, "an encoder must be BasicImageEncoder"),
    ],
)
def test_what_is_not_supported_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        VilaFamily(vila_folder(**values)).build()


def test_other_parts_are_refused(tmp_path):
    folder = tiny_vila(tmp_path, projector="mlp_downsample_3x3_s2")
    with pytest.raises(ValueError, match="mm_projector must be linear or .*got 'mlp_downsample_3x3_s2'"):
        VilaFamily(str(folder)).build()
    Path(folder, "llm", "config.json").unlink()
    with pytest.raises(ValueError, match="is no VILA folder: neither llm/config.json nor llm_cfg"):
        VilaFamily(str(folder)).build()
