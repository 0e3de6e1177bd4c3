"""Packing: groups of completions become micro-batches within a token budget, each prompt once per micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.packing.lengths import length_problem
from longrl.types import GroupSpan, Packed, Prompt, Row


@dataclass
class _Item:
    """A prompt and some of its completions, with their numbers over the whole step."""

    prompt: Prompt
    completions: list[Tensor] = field(default_factory=list)
    completion_numbers: list[int] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.prompt.input_ids) + sum(map(len, self.completions))


def pack(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], max_tokens: int) -> list[Packed]:
    """Micro-batches of at most `max_tokens` tokens. A group that is larger is split, its prompt repeated: still exact.

    Completions and their tokens are numbered in the order given; a completion is never split.

    Args:
        prompts: the P prompts.
        completions: for each prompt the [S] token ids of its completions; they may be empty.
        max_tokens: budget of a micro-batch.

    Returns:
        The micro-batches, groups in the order given.

    Raises:
        ValueError: a prompt with its longest completion is over the budget.
    """
    batches: list[list[_Item]] = []
    room = 0
    for item in _numbered(prompts, completions):
        for piece in _split(item, max_tokens):
            if piece.tokens > room:
                batches.append([])
                room = max_tokens
            batches[-1].append(piece)
            room -= piece.tokens
    return [_packed(items) for items in batches]


def dummy_micro_batch(num_axes: int) -> Packed:
    """The smallest micro-batch there is, for a rank that has nothing to do while others work: one scored row."""
    one, positions = torch.zeros(1, dtype=torch.int64), torch.zeros(num_axes, 1, dtype=torch.int64)
    prompt = Prompt(id="idle", input_ids=one, position_ids=positions, media=(), row=Row("idle", "", ""))
    (packed,) = pack([prompt], [[one]], max_tokens=2)
    return packed


def _numbered(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> list[_Item]:
    items, number, token = [], 0, 0
    for prompt, answers in zip(prompts, completions, strict=True):
        item = _Item(prompt)
        for answer in answers:
            _add(item, answer, number, token)
            number, token = number + 1, token + len(answer)
        items.append(item)
    return items


def _add(item: _Item, completion: Tensor, number: int, first_token: int) -> None:
    item.completions.append(completion)
    item.completion_numbers.append(number)
    item.first_tokens.append(first_token)


def _split(item: _Item, max_tokens: int) -> list[_Item]:
    """The item in pieces within the budget, each with the whole prompt and at least one completion."""
    if item.tokens <= max_tokens:
        return [item]
    pieces = [_Item(item.prompt)]
    for completion, number, token in zip(item.completions, item.completion_numbers, item.first_tokens, strict=True):
        if pieces[-1].completions and pieces[-1].tokens + len(completion) > max_tokens:
            pieces.append(_Item(item.prompt))
        _add(pieces[-1], completion, number, token)
    problem = length_problem(
        f"prompt {item.prompt.id!r}",
        len(item.prompt.input_ids),
        max(map(len, item.completions), default=0),
        limit=max_tokens,
        option="model.max_tokens_per_micro_batch",
    )
    if problem:
        raise ValueError(problem)
    return pieces


def _packed(items: list[_Item]) -> Packed:
    spans, start = [], 0
    for item in items:
        spans.append(GroupSpan(start, len(item.prompt.input_ids), tuple(map(len, item.completions))))
        start = spans[-1].stop
    return Packed(
        input_ids=torch.cat([ids for item in items for ids in (item.prompt.input_ids, *item.completions)]),
        position_ids=torch.cat([_positions(item) for item in items], dim=1),
        spans=tuple(spans),
        predict_from=_cat(_predict_from(span) for span in spans),
        target_ids=_cat(answer for item in items for answer in item.completions),
        completion_index=_cat(
            torch.full((len(answer),), number)
            for item in items
            for answer, number in zip(item.completions, item.completion_numbers, strict=True)
        ),
        token_index=_cat(
            torch.arange(first, first + len(answer))
            for item in items
            for answer, first in zip(item.completions, item.first_tokens, strict=True)
        ),
        media_keys=tuple(media.key for item in items for media in item.prompt.media),
        media_kinds=tuple(media.kind for item in items for media in item.prompt.media),
    )


def _positions(item: _Item) -> Tensor:
    """[A, tokens of the item]: every completion goes on where the prompt ended."""
    prompt = item.prompt.position_ids
    following = int(prompt.max()) + 1
    own = [torch.arange(following, following + len(ids)).expand(len(prompt), -1) for ids in item.completions]
    return torch.cat([prompt, *own], dim=1)


def _predict_from(span: GroupSpan) -> Tensor:
    """For each completion token the position before it: the prompt's last one for first tokens."""
    rows, start = [], span.start + span.prompt_tokens
    for count in span.completion_tokens:
        own = torch.arange(start - 1, start + count - 1)
        own[:1] = span.start + span.prompt_tokens - 1
        rows.append(own)
        start += count
    return _cat(rows)


def _cat(parts: object) -> Tensor:
    """One int64 tensor of all parts; empty when there are none."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])  # type: ignore[misc]
