"""Packing: groups of completions become micro-batches within a token budget, each prompt once per micro-batch.

Letters: A position axes, P prompts, T tokens of a prompt, S of a completion, n of which were sampled, L of a
micro-batch, R scored rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.packing.lengths import length_problem
from longrl.types import Continuation, GroupSpan, Media, Packed, Prompt, Row


@dataclass(frozen=True)
class _GroupPart:
    """A prompt and neighbouring completions of it, which go into one micro-batch together."""

    prompt: Prompt
    completions: Sequence[Continuation]
    num_tokens: int
    """Prompt and completions together."""
    first_completion: int
    """Index of the first completion over the whole step."""
    first_token: int
    """Index of its first sampled token over the whole step."""


Continuations = Sequence[Sequence[Continuation | Tensor]]
"""Completions of each prompt; token ids alone were all sampled."""


def continuations(completions: Continuations) -> list[list[Continuation]]:
    """The same, token ids as continuations, too."""
    return [[one if isinstance(one, Continuation) else Continuation(one) for one in group] for group in completions]


def pack(prompts: Sequence[Prompt], completions: Continuations, max_tokens: int) -> list[Packed]:
    """Micro-batches of at most `max_tokens` tokens. A group that is larger is split, its prompt repeated: still exact.

    Completions and their sampled tokens are numbered in the order given; a completion is never split.

    Args:
        prompts: the P prompts.
        completions: for each prompt its completions; they may be empty.
        max_tokens: budget of a micro-batch.

    Returns:
        The micro-batches, groups in the order given.

    Raises:
        ValueError: a prompt with its longest completion is over the budget.
    """
    micro_batches: list[list[_GroupPart]] = []
    room = 0  # tokens that the last micro-batch has left
    num_completions = 0
    num_tokens = 0
    for prompt, group in zip(prompts, continuations(completions), strict=True):
        # 1. A group that fits stays whole; a larger one is cut between completions.
        num_new = sum(len(completion.token_ids) for completion in group)
        parts = [_GroupPart(prompt, group, len(prompt.input_ids) + num_new, num_completions, num_tokens)]
        if parts[0].num_tokens > max_tokens:
            parts = _split_group(parts[0], max_tokens)
        # 2. In the order given, so that what is packed together does not depend on what comes later.
        for part in parts:
            if part.num_tokens > room:
                micro_batches.append([])
                room = max_tokens
            micro_batches[-1].append(part)
            room -= part.num_tokens
        num_completions += len(group)
        num_tokens += sum(completion.num_sampled for completion in group)
    return [_lay_end_to_end(parts) for parts in micro_batches]


def dummy_micro_batch(num_axes: int) -> Packed:
    """The smallest micro-batch, one scored row: for a rank that has nothing to do while others gather weights."""
    token = torch.zeros(1, dtype=torch.int64)
    positions = torch.zeros(num_axes, 1, dtype=torch.int64)
    prompt = Prompt(id="dummy", input_ids=token, position_ids=positions, media=(), row=Row("dummy", "", ""))
    return pack([prompt], [[token]], max_tokens=2)[0]


def _split_group(group: _GroupPart, max_tokens: int) -> list[_GroupPart]:
    """A group that is too large as parts within the budget, each with the whole prompt."""
    prompt_tokens = len(group.prompt.input_ids)
    lengths = [len(completion.token_ids) for completion in group.completions]
    name = f"prompt {group.prompt.id!r}"
    option = "model.max_tokens_per_micro_batch"
    problem = length_problem(name, prompt_tokens, max(lengths, default=0), limit=max_tokens, option=option)
    if problem:
        raise ValueError(problem)
    parts: list[_GroupPart] = []
    start = 0  # the part's first completion within the group
    first_token = group.first_token
    while start < len(lengths):
        # As many completions as fit; the first one does, as was just checked.
        stop = start
        num_tokens = prompt_tokens
        while stop < len(lengths) and num_tokens + lengths[stop] <= max_tokens:
            num_tokens += lengths[stop]
            stop += 1
        completions = group.completions[start:stop]
        parts.append(_GroupPart(group.prompt, completions, num_tokens, group.first_completion + start, first_token))
        first_token += sum(completion.num_sampled for completion in completions)
        start = stop
    return parts


def _lay_end_to_end(parts: Sequence[_GroupPart]) -> Packed:
    """One sequence of all parts: `[prompt][y1]..[yG]`, part after part."""
    none = torch.empty(0, dtype=torch.int64)  # a micro-batch may have no completion: the rollout engine's prefill
    spans = []
    input_ids = []
    position_ids = []
    shown = []
    predict_from = [none]
    target_ids = [none]
    completion_index = [none]
    token_index = [none]
    media: list[Media] = []
    start = 0  # where the next part will lie
    for part in parts:
        prompt = part.prompt
        lengths = tuple(len(completion.token_ids) for completion in part.completions)
        span = GroupSpan(start, len(prompt.input_ids), lengths)
        spans.append(span)
        start = span.stop
        input_ids.append(prompt.input_ids)
        position_ids.append(prompt.position_ids)  # [A, T]
        shown.append(torch.zeros(span.prompt_tokens, dtype=torch.bool))
        media += prompt.media
        row = span.start + span.prompt_tokens  # where the next completion will lie
        last_of_prompt = row - 1
        next_position = prompt.position_ids.max() + 1  # with M-RoPE a video takes fewer positions than tokens
        token = part.first_token
        for index, completion in enumerate(part.completions, part.first_completion):
            ids = completion.token_ids  # [S]
            length = len(ids)
            # Every completion goes on where the prompt ended, as if the others were not there.
            positions = completion.position_ids
            if positions is None:
                positions = torch.arange(length).expand(len(prompt.position_ids), -1)
            input_ids.append(ids)
            position_ids.append(next_position + positions)  # [A, S]
            # A token is predicted from the row before it, which for the first one is the prompt's last row.
            rows = torch.arange(row - 1, row + length - 1)  # [S]
            rows[:1] = last_of_prompt
            sampled = completion.sampled
            if sampled is not None:
                shown.append(~sampled)
                rows = rows[sampled]  # [n]
                ids = ids[sampled]
            else:
                shown.append(torch.zeros(length, dtype=torch.bool))
            predict_from.append(rows)
            target_ids.append(ids)
            completion_index.append(torch.full((len(ids),), index))
            token_index.append(torch.arange(token, token + len(ids)))
            media += completion.media
            row += length
            token += len(ids)
    all_shown = torch.cat(shown)
    return Packed(
        input_ids=torch.cat(input_ids),  # [L]
        position_ids=torch.cat(position_ids, dim=1),  # [A, L]
        spans=tuple(spans),
        predict_from=torch.cat(predict_from),  # [R]
        target_ids=torch.cat(target_ids),  # [R]
        completion_index=torch.cat(completion_index),  # [R]
        token_index=torch.cat(token_index),  # [R]
        media_keys=tuple(item.key for item in media),
        media_kinds=tuple(item.kind for item in media),
        shown=all_shown if all_shown.any() else None,
    )
