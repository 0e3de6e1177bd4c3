"""Tiny SD3 and Wan pipelines of the true architectures, with random weights: for tests, the demo, and a laptop.

    python -m longrl.testing.tiny_diffusion sd3 runs/tiny/sd3
    python -m longrl.testing.tiny_diffusion wan runs/tiny/wan

writes a folder as diffusers' own pipelines save and load it; sizes are in tiny_models.yaml. The autoencoders are random
too, so their pictures are abstract; but colours follow the latents, which is enough for a policy to learn what a colour
reward wants.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from longrl.testing.tiny import SIZES

CORPUS = ("a red picture", "a green picture", "a blue picture", "two photos of a small cat left of the yellow cup")
SEED = 0


def tiny_sd3(folder: str | Path, seed: int = SEED, corpus: Iterable[str] = CORPUS) -> Path:
    """Writes a Stable Diffusion 3.5: joint attention, a second attention in the first block, three text encoders.

    Args:
        folder: where to write; made if missing.
        seed: of the weights.
        corpus: what the tokenizers have words for.

    Returns:
        The folder. Latents are [4, H / 2, W / 2].
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = _clip_tokenizer(corpus), _t5_tokenizer(corpus)
        tokens = {name: getattr(clip, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        clip_config = transformers.CLIPTextConfig(vocab_size=len(clip), **tokens, **SIZES["clip"])
        t5_config = transformers.T5Config(vocab_size=len(t5), **SIZES["t5"])
        # In this order, which decides the weights.
        parts: dict[str, Any] = {
            "transformer": diffusers.SD3Transformer2DModel(**SIZES["sd3_transformer"]),
            "vae": diffusers.AutoencoderKL(**SIZES["sd3_vae"]),
            "text_encoder": transformers.CLIPTextModelWithProjection(clip_config),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(clip_config),
            "text_encoder_3": transformers.T5EncoderModel(t5_config),
        }
        _enliven(parts["vae"].decoder)
    parts |= {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = diffusers.StableDiffusion3Pipeline(**parts, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_wan(folder: str | Path, seed: int = SEED, corpus: Iterable[str] = CORPUS, num_heads: int = 2) -> Path:
    """Writes a Wan 2.1 for text to video: 3-D rotary positions, a causal autoencoder, UMT5, UniPC's schedule.

    Args:
        folder: where to write; made if missing.
        seed: of the weights.
        corpus: what the tokenizer has words for.
        num_heads: heads of 12 numbers each.

    Returns:
        The folder. Latents of F frames are [4, (F - 1) / 4 + 1, H / 8, W / 8].
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = _t5_tokenizer(corpus)
        parts: dict[str, Any] = {
            "tokenizer": t5,
            "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(t5), **SIZES["t5"])),
            "transformer": diffusers.WanTransformer3DModel(num_attention_heads=num_heads, **SIZES["wan_transformer"]),
            "vae": diffusers.AutoencoderKLWan(**SIZES["wan_vae"]),
        }
        _enliven(parts["vae"].decoder)
    scheduler = diffusers.UniPCMultistepScheduler(**SIZES["wan_scheduler"])
    pipeline: Any = diffusers.WanPipeline(**parts, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return Path(folder)


def _enliven(decoder: nn.Module) -> None:
    """Kernels that mostly average, without biases: colours follow the latents.

    Pictures of an ordinary random decoder are nearly grey, and the same whatever the latents.
    """
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
            weight, places = layer.weight.detach(), layer.weight[0, 0].numel()
            mixing = torch.randn(weight.shape[:2]) / places
            noise = 0.3 * torch.randn_like(weight) / places**0.5
            weight.copy_((mixing.view(*mixing.shape, *[1] * (weight.dim() - 2)) + noise) / weight.shape[1] ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _clip_tokenizer(corpus: Iterable[str]) -> Any:
    """Letters, each also at the end of a word, and merges learnt from the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=letters, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([*corpus, " ".join(letters)], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=24)


def _t5_tokenizer(corpus: Iterable[str]) -> Any:
    """Letters, and the words of the corpus as one piece each."""
    words = sorted({word for text in corpus for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -2.0) for word in words if len(word) > 1]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}", -4.0)]
    pieces += [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


if __name__ == "__main__":
    {"sd3": tiny_sd3, "wan": tiny_wan}[sys.argv[1]](sys.argv[2])
