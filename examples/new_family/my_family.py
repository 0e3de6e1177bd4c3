"""Two model families as you write them outside of longrl: a language model, and a vision-language model.

What a family is asked, and which hook answers, stands in longrl/models/family.py; all other hooks have defaults.
"""

import torch
import transformers

from longrl import CausalFamily


class MistralFamily(CausalFamily):
    """A language model of transformers."""

    model_types = ("mistral",)  # other models are refused as soon as their config.json is read

    def auto_class(self):
        return transformers.AutoModelForCausalLM

    def backbone(self, model):  # embeddings in, last hidden states out
        return model.model


class SquareInternVLFamily(CausalFamily):
    """InternVL3 as transformers has it: every image and frame is one square of the encoder, without tiles."""

    model_types = ("internvl",)

    def auto_class(self):
        return transformers.AutoModelForImageTextToText

    def attn_implementation(self):  # longrl's attention for the text, torch's for the pixels
        return {"text_config": super().attn_implementation(), "vision_config": "sdpa"}

    def backbone(self, model):
        return model.model.language_model

    # -- prompts: which token stands for media, and what of a row the chat template is given

    def media_token_ids(self):
        return dict.fromkeys(("image", "video"), self.config.image_token_id)

    def chat_content(self, content):
        return [part | {"type": "image"} if part["type"] == "video" else part for part in content]

    # -- pixels: frames become patches, and patches so many tokens

    def grid(self, num_frames, height, width, **options):
        side = self.config.vision_config.image_size[0] // self.config.vision_config.patch_size[0]
        return num_frames, side, side

    def pixel_patches(self, frames):  # [F, 3, H, W] uint8 -> [F, values]
        size = self.config.vision_config.image_size
        pixels = torch.nn.functional.interpolate(frames.pixels.float(), size, mode="bilinear", antialias=True)
        return (pixels / 127.5 - 1).flatten(1)

    def num_features(self, media):
        frames, height, width = media.grid_thw
        return int(frames * height * width * self.config.downsample_ratio**2)

    # -- features: the modules that run, and how patches go through them

    def media_encoders(self, model):
        return model.model.vision_tower, model.model.multi_modal_projector

    def encoder_settings(self):  # what decides features beside weights, for the cache on disk
        return self.config.vision_config.to_dict()

    def encode_media(self, model, media):  # -> [N_i, D] of each
        pixels = torch.cat([item.patches for item in media]).view(-1, 3, *self.config.vision_config.image_size)
        features = model.model.get_image_features(pixels).pooler_output
        return [rows.flatten(0, 1) for rows in features.split([len(item.patches) for item in media])]
