"""Experts that an engine chose for completions, laid out as the rows of packed micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.types import Completion, Continuation, GroupSpan, Packed


def with_experts(micro_batches: Sequence[Packed], groups: Sequence[Sequence[Continuation]]) -> list[Packed]:
    """The micro-batches with the experts of their completions and prompts; as they are if no engine said any.

    Where a row has none, its routers' own choice stands: the last token of a completion, which the engine never read,
    and a group whose engine did not say.

    Args:
        micro_batches: of `pack`, all of them in order.
        groups: whose completions were packed, in the same order.
    """
    known = [experts for group in groups if (experts := prompt_experts(group)) is not None]
    if not known:
        return list(micro_batches)
    shape = known[0].shape[1:]  # [M, k]
    filled = []
    group = 0
    first = 0  # the next span's first completion within the group
    for packed in micro_batches:
        experts = torch.full((len(packed.input_ids), *shape), -1, dtype=torch.int16)
        for span in packed.spans:
            stop = first + len(span.completion_tokens)
            _fill_span(experts, span, groups[group], slice(first, stop))
            first = stop
            if first == len(groups[group]):  # a group that is too large has several spans
                group += 1
                first = 0
        filled.append(dataclasses.replace(packed, experts=experts))
    return filled


def prompt_experts(group: Sequence[Continuation]) -> Tensor | None:
    """[T, M, k] of a group's prompt, from the completion that carries them; None if none does."""
    completions = [answer for answer in group if isinstance(answer, Completion)]
    return next((answer.prompt_experts for answer in completions if answer.prompt_experts is not None), None)


def _fill_span(experts: Tensor, span: GroupSpan, group: Sequence[Continuation], part: slice) -> None:
    """Writes the rows of a prompt and some completions of it into those of the micro-batch."""
    of_prompt = prompt_experts(group)
    row = span.start + span.prompt_tokens
    if of_prompt is not None:
        experts[span.start : row] = of_prompt
    for answer in group[part]:
        if isinstance(answer, Completion) and answer.experts is not None:
            experts[row : row + len(answer.experts)] = answer.experts
        row += len(answer.token_ids)
