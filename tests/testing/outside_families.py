"""Families as a user writes them outside of longrl, by longrl/models/family.py alone."""

import json
from pathlib import Path

import torch
import transformers

from longrl.models.base import CausalFamily
from longrl.testing.tiny import tiny_text, tiny_tokenizer


class MistralFamily(CausalFamily):
    """A language model of transformers."""

    def auto_class(self):
        return transformers.AutoModelForCausalLM

    def backbone(self, model):
        return model.model


class InternVLFamily(CausalFamily):
    """InternVL3 as transformers has it: every image and frame is one square of the encoder, without tiles."""

    def auto_class(self):
        return transformers.AutoModelForImageTextToText

    def attn_implementation(self):
        return {"text_config": super().attn_implementation(), "vision_config": "sdpa"}

    def backbone(self, model):
        return model.model.language_model

    def media_token_ids(self):
        return dict.fromkeys(("image", "video"), self.config.image_token_id)

    def chat_content(self, content):
        return [part | {"type": "image"} if part["type"] == "video" else part for part in content]

    def grid(self, num_frames, height, width, **options):
        side = self.config.vision_config.image_size[0] // self.config.vision_config.patch_size[0]
        return num_frames, side, side

    def pixel_patches(self, frames):
        size = self.config.vision_config.image_size
        pixels = torch.nn.functional.interpolate(frames.pixels.float(), size, mode="bilinear", antialias=True)
        return (pixels / 127.5 - 1).flatten(1)

    def num_features(self, media):
        return int(media.grid_thw[0] * media.grid_thw[1] * media.grid_thw[2] * self.config.downsample_ratio**2)

    def media_encoders(self, model):
        return model.model.vision_tower, model.model.multi_modal_projector

    def encoder_settings(self):
        return self.config.vision_config.to_dict()

    def encode_media(self, model, media):
        pixels = torch.cat([item.patches for item in media]).view(-1, 3, *self.config.vision_config.image_size)
        features = model.model.get_image_features(pixels).pooler_output
        return [rows.flatten(0, 1) for rows in features.split([len(item.patches) for item in media])]


def internvl_inputs(prompt):
    """The media of a prompt as InternVL's own forward takes them."""
    return (
        {"pixel_values": torch.cat([item.patches for item in prompt.media]).view(-1, 3, 28, 28)} if prompt.media else {}
    )


def tiny_mistral(folder: Path) -> Path:
    return tiny_text(folder, "mistral", sliding_window=None)


def tiny_internvl(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    text = json.loads((tiny_text(folder, "qwen2", tokenizer) / "config.json").read_text())
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": [28, 28], "patch_size": [7, 7],
    }  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token,
        architectures=["InternVLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    return folder
