"""Checks the families of my_family.py against plain transformers, on tiny models with random weights.

    python examples/new_family/check.py

writes the tiny models to runs/examples, and compares logits, gradients, features, generation, export and two ranks that
share a sequence. Then a run trains one (family.yaml):

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --config examples/new_family/family.yaml --run_dir runs/examples/new_family
"""

import argparse
from pathlib import Path

import torch
import transformers
from my_family import MistralFamily, SquareInternVLFamily

from longrl.testing import check_family
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


def main(folder="runs/examples", num_ranks=2):
    mistral = tiny_mistral(Path(folder, "tiny_mistral"))
    internvl = tiny_internvl(Path(folder, "tiny_internvl"))
    reports = [
        check_family(MistralFamily(str(mistral), random_init=True), num_ranks=num_ranks),
        check_family(
            SquareInternVLFamily(str(internvl), random_init=True), media_inputs=media_inputs, num_ranks=num_ranks
        ),
    ]
    for report in reports:
        print(report)
    return reports


if __name__ == "__main__":  # ranks are processes, which import this file
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2, help="1 leaves sequence parallelism out")
    main(num_ranks=parser.parse_args().ranks)
