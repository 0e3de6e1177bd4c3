"""Tiny CLIP and SigLIP of the true architectures, as `save_pretrained` leaves them: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SIDE = 64
"""Pixels of a picture's side."""
MAX_TOKENS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
PIXELS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tiny_clip(folder: str | Path, words: Iterable[str], seed: int = 0, **sizes: Any) -> Path:
    """Writes a CLIP with random weights, whose tokens are words.

    Args:
        folder: where to write; made if missing.
        words: lower-case words that it has tokens for; others are spelled.
        seed: of the weights.
        sizes: in place of `SIZES`, of both sides alike.

    Returns:
        The folder.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = _word_tokenizer(CLIPTokenizer, words)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sides = SIZES | sizes
    text = {**sides, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = {**sides, "image_size": SIDE, "patch_size": SIDE // 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=sides["hidden_size"]))
    square = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, **PIXELS)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return Path(folder)


def tiny_siglip(folder: str | Path, words: Iterable[str], seed: int = 0, **sizes: Any) -> Path:
    """The same of a SigLIP, with CLIP's tokenizer in the place of its own."""
    from transformers import CLIPTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    tokenizer = _word_tokenizer(CLIPTokenizer, words)
    sides = SIZES | sizes
    text = {**sides, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    vision = {**sides, "image_size": SIDE, "patch_size": SIDE // 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, **PIXELS)
    SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return Path(folder)


def _word_tokenizer(kind: type[Any], words: Iterable[str]) -> Any:
    """Letters, each also at the end of a word, and merges that make the words."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:  # from behind: whatever follows, a merge made for a word ends with its end
            pair = pieces[-2], pieces[-1]
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocab.append(pieces[-1])
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocab))}
    return kind(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)
