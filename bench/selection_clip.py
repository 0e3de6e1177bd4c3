"""A small CLIP for bench/selection.py, learnt from generated pictures and captions: nothing is downloaded.

It is CLIP's architecture and loss (arXiv:2103.00020); captions that are alike in a batch are right for each other's
pictures.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from selection_videos import all_words, draw_pair
from torch import Tensor

from longrl.testing.tiny_clip import tiny_clip

BATCH = 64
LR = 1e-3
WARMUP = 50
POOL = 200
"""Batches that are drawn, and learnt from again and again."""


def write_clip(folder: Path, num_steps: int, seed: int = 0) -> Path:
    """Trains a CLIP and writes its folder."""
    from transformers import AutoModel, AutoProcessor

    tiny_clip(folder, all_words(), seed=seed)
    model: Any = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    rng = Random(f"pictures {seed}")
    pool = [draw_batch(processor, rng) for _ in range(min(POOL, num_steps))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP, max((num_steps - step) / (0.3 * num_steps), 0.02))
    )
    model.train()
    for step in range(num_steps):
        loss = clip_loss(model, *pool[step % len(pool)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    return folder


def draw_batch(processor: Any, rng: Random) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Pictures and captions as the model reads them, and which are alike, [BATCH, BATCH]."""
    pictures, scenes, captions = zip(*(draw_pair(rng) for _ in range(BATCH)), strict=True)
    pixels = processor.image_processor(
        images=[picture.numpy() for picture in pictures], input_data_format="channels_last", return_tensors="pt"
    )
    tokens = processor.tokenizer(list(captions), padding="max_length", return_tensors="pt")
    alike = torch.tensor([[one == other for other in scenes] for one in scenes])
    return pixels, tokens, alike


def clip_loss(model: Any, pixels: dict[str, Tensor], tokens: dict[str, Tensor], alike: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies."""
    output = model(**pixels, **tokens)
    wanted = alike / alike.sum(dim=1, keepdim=True)
    losses = [
        -(wanted * logits.log_softmax(dim=1)).sum(dim=1).mean()
        for logits in (output.logits_per_image, output.logits_per_text)
    ]
    return torch.stack(losses).mean()
