"""Folders of tiny models, for which `check.py` checks the families, and what InternVL's own forward is called with."""

import torch
import transformers

from longrl.testing.tiny import tiny_text, tiny_tokenizer


def tiny_mistral(folder):
    """Config and tokenizer of a small Mistral."""
    return tiny_text(folder, "mistral", sliding_window=None)


def tiny_internvl(folder):
    """Config and tokenizer of a small InternVL: 4 tokens for a frame of 28 x 28."""
    tokenizer = tiny_tokenizer()
    text = transformers.AutoConfig.from_pretrained(tiny_text(folder, "qwen2", tokenizer))
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        architectures=["InternVLForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    return folder


def media_inputs(prompt):
    """The media of a prompt as InternVL's own forward takes them: `check_family` compares with it."""
    if not prompt.media:
        return {}
    return {"pixel_values": torch.cat([item.patches for item in prompt.media]).view(-1, 3, 28, 28)}
