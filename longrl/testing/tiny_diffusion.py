"""Tiny SD3 and Wan pipelines of the true architectures, with random weights: for tests, the demo, and a laptop.

    python -m longrl.testing.tiny_diffusion sd3 runs/tiny/sd3
    python -m longrl.testing.tiny_diffusion wan runs/tiny/wan

writes a folder as diffusers' own pipelines save and load it. The autoencoders are random too, so their pictures are
abstract; but colours follow the latents, which is enough for a policy to learn what a colour reward wants.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = _clip_tokenizer(corpus), _t5_tokenizer(corpus)
        parts = {
            "transformer": SD3Transformer2DModel(
                sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
                pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=32,
                use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
            ),
            "text_encoder": CLIPTextModelWithProjection(_clip_config(clip)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_config(clip)),
            "text_encoder_3": _t5_encoder(t5),
        }  # fmt: skip
        _enliven(parts["vae"].decoder)
    pipeline: Any = StableDiffusion3Pipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5
    )
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
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = _t5_tokenizer(corpus)
        encoder = UMT5EncoderModel(UMT5Config(**_t5_sizes(t5)))
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=num_heads, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=32, freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        vae: Any = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 1.0, 2.0, 1.2],
        )  # fmt: skip
        _enliven(vae.decoder)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    parts = {"tokenizer": t5, "text_encoder": encoder, "vae": vae, "transformer": transformer}
    pipeline: Any = WanPipeline(**parts, scheduler=scheduler)
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


def _clip_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _t5_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip


def _t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_t5_sizes(tokenizer)))


def _clip_tokenizer(corpus: Iterable[str]) -> Any:
    """Letters, each also at the end of a word, and merges learnt from the corpus."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

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
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=24)


def _t5_tokenizer(corpus: Iterable[str]) -> Any:
    """Letters, and the words of the corpus as one piece each."""
    from transformers import T5Tokenizer

    words = sorted({word for text in corpus for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -2.0) for word in words if len(word) > 1]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}", -4.0)]
    pieces += [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


if __name__ == "__main__":
    {"sd3": tiny_sd3, "wan": tiny_wan}[sys.argv[1]](sys.argv[2])
