"""Who of a team generates which completions: every prompt is prefilled once, as long as there are enough prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Prompt


@dataclass(frozen=True)
class Piece:
    """Neighbouring completions of one prompt, by their numbers."""

    prompt: int
    first: int
    count: int


def pieces(num_prompts: int, num_generations: int, rank: int, size: int) -> list[Piece]:
    """A rank's part of P * G completions: whole prompts where there are enough for all ranks, else shares of a prompt.

    Args:
        num_prompts: P.
        num_generations: G.
        rank: in its team.
        size: of the team.

    Example:
        `pieces(2, 8, rank=1, size=4)` is completions 4 to 7 of prompt 0.
    """
    if num_prompts >= size:
        own = range(num_prompts * rank // size, num_prompts * (rank + 1) // size)
        return [Piece(prompt, 0, num_generations) for prompt in own]
    total = num_prompts * num_generations
    start, stop = total * rank // size, total * (rank + 1) // size
    found = []
    while start < stop:
        prompt, first = divmod(start, num_generations)
        count = min(num_generations - first, stop - start)
        found.append(Piece(prompt, first, count))
        start += count
    return found


def joined(
    prompts: Sequence[Prompt], own: Sequence[tuple[Piece, Group]], sp_group: Axis, num_chunks: int
) -> list[Group]:
    """The whole groups, from every rank's scored pieces; prompts and their media do not travel.

    Args:
        prompts: of the team, the same on all its ranks.
        own: this rank's pieces.
        team: the ranks that have the others.
        num_chunks: messages; more of them need less memory.
    """
    if sp_group.size == 1:
        return [group for _, group in own]
    sent = [(piece, _without_prompt(group)) for piece, group in own]
    everyone = sorted(sp_group.gather_list(sent, num_chunks), key=lambda item: (item[0].prompt, item[0].first))
    by_prompt: list[list[Group]] = [[] for _ in prompts]
    for piece, (completions, rewards, parts, valid) in everyone:
        by_prompt[piece.prompt].append(Group(prompts[piece.prompt], completions, rewards, parts, valid))
    return [_merged(groups) for groups in by_prompt]


def _without_prompt(group: Group) -> tuple[list[Completion], torch.Tensor | None, dict[str, torch.Tensor], object]:
    return group.completions, group.rewards, group.reward_parts, group.valid


def _merged(groups: Sequence[Group]) -> Group:
    first = groups[0]
    if len(groups) == 1:
        return first
    return Group(
        first.prompt,
        [completion for group in groups for completion in group.completions],
        torch.cat([group.rewards for group in groups]),
        {name: torch.cat([group.reward_parts[name] for group in groups]) for name in first.reward_parts},
        torch.cat([group.valid for group in groups]),
    )
