"""Tiny teachers, and their terms written out in float64 from plain forwards of stock models."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import torch
from torch import Tensor

from longrl.algorithms import Distillation
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import TextFamily
from longrl.modules.local_teacher import LocalTeacher
from longrl.packing.pack import Continuations, continuations
from longrl.testing.plain_forward import plain_logits
from longrl.testing.tiny import tiny_qwen2_5_vl, tiny_text, tiny_tokenizer
from longrl.types import FULL_SHARD, FrameShard, Prompt
from tests.tiny import frames, held, row, stock_model

WIDE = {"hidden_size": 72, "num_hidden_layers": 1, "initializer_range": 0.3}
"""One layer, wider than the policies, of likely and unlikely tokens."""
EXTRA_ROWS = 9
"""Of the teachers' heads, behind the tokens."""

DISTILLATIONS = {
    "reverse": Distillation("reverse_kl", coef=0.7),
    "forward": Distillation("forward_kl", coef=0.7, sft_coef=0.3),
    "jensen": Distillation("jensen_shannon", beta=0.2, coef=2.0, temperature=0.8),
    "top": Distillation("forward_kl", top_k=5, coef=0.7, sft_coef=0.0),
    "sampled": Distillation("sampled", coef=0.7),
    "advantage": Distillation("sampled", placement="advantage", coef=0.7),
}


@functools.cache
def wide_text_folder(vocab_size: int | None = None) -> str:
    size = vocab_size or len(tiny_tokenizer()) + EXTRA_ROWS
    return str(tiny_text(tempfile.mkdtemp(prefix="longrl-wide-text-"), vocab_size=size, **WIDE))


@functools.cache
def wide_vl_folder() -> str:
    text = WIDE | {"vocab_size": len(tiny_tokenizer()) + EXTRA_ROWS}
    vision = {"out_hidden_size": text["hidden_size"]}
    return str(tiny_qwen2_5_vl(tempfile.mkdtemp(prefix="longrl-wide-vl-"), text=text, vision=vision))


def wide_text_family(vocab_size: int | None = None, **kwargs: object) -> TextFamily:
    return TextFamily(wide_text_folder(vocab_size), **{"random_init": True, "init_seed": 5, **kwargs})


def wide_vl_family(**kwargs: object) -> Qwen2_5_VLFamily:
    defaults = {"random_init": True, "init_seed": 5, "max_pixels": 56 * 56, "min_pixels": 28 * 28}
    return Qwen2_5_VLFamily(wide_vl_folder(), **{**defaults, **kwargs})


def wide_text_teacher(**options: object) -> LocalTeacher:
    return LocalTeacher(wide_text_family(), **options)


def told_more(prompts: list[Prompt], shard: FrameShard = FULL_SHARD) -> list[Prompt]:
    """The same, of which a teacher reads a longer question in the place of the last, and of a video more frames."""
    family = wide_vl_family()
    clip = held(frames(10, 60, 60, "longer"), shard, 2)
    views = [family.render(row("more"), "Which one is it? It is <video> this.", [clip]), None]
    views = (views * len(prompts))[: len(prompts)]
    return [dataclasses.replace(prompt, teacher=view) for prompt, view in zip(prompts, views, strict=True)]


def read(prompts: list[Prompt]) -> list[Prompt]:
    """What a teacher reads."""
    return [prompt.teacher or prompt for prompt in prompts]


def all_logits(plain: torch.nn.Module, prompts: list[Prompt], completions: Continuations) -> Tensor:
    """[N, V] float64 logits of all sampled tokens, one ordinary forward for each completion."""
    logits = []
    for prompt, group in zip(prompts, continuations(completions), strict=True):
        logits += [plain_logits(plain, prompt, completion).double() for completion in group]
    return torch.cat(logits)


def token_ids(completions: Continuations) -> Tensor:
    """[N] sampled tokens."""
    parts = []
    for group in continuations(completions):
        for one in group:
            parts.append(one.token_ids if one.sampled is None else one.token_ids[one.sampled])
    return torch.cat(parts)


def teacher_logits(
    teacher: LocalTeacher, prompts: list[Prompt], completions: Continuations, temperature: float = 1.0
) -> Tensor:
    """[N, V] float64 logits of a teacher over its temperature, by a stock model."""
    model = teacher.family.build()
    axes = teacher.family.num_axes
    prompts = [dataclasses.replace(prompt, position_ids=prompt.position_ids[:axes]) for prompt in read(prompts)]
    with torch.no_grad():
        return all_logits(stock_model(model, teacher.family), prompts, completions) / temperature


def teacher_term(distillation: Distillation, logits: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """[N] float64 losses of tokens without the factor, by the formulas.

    Args:
        distillation: the term, of the loss.
        logits: [N, V] of the policy over its temperature, with gradient.
        teacher: [N, W] over its own, W more than V.
        ids: [N] tokens.
    """
    if distillation.divergence == "sampled":
        logp = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        teacher_logp = teacher.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        return (logp - teacher_logp).square() / 2
    q = logits.softmax(-1)
    if distillation.top_k is None:
        p = teacher[:, : logits.shape[1]].softmax(-1)
    else:
        whole = teacher.softmax(-1)
        top = whole[:, : logits.shape[1]].topk(distillation.top_k, -1).indices
        p = torch.cat([whole.gather(-1, top), 1 - whole.gather(-1, top).sum(-1, keepdim=True)], -1)
        q = torch.cat([q.gather(-1, top), 1 - q.gather(-1, top).sum(-1, keepdim=True)], -1)
    if distillation.divergence == "reverse_kl":
        return (q * (q.log() - p.log())).sum(-1)
    if distillation.divergence == "forward_kl":
        return (p * (p.log() - q.log())).sum(-1)
    beta = distillation.beta
    m = beta * p + (1 - beta) * q
    return (beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())).sum(-1)
