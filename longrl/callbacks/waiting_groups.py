"""Groups that wait for a later step, and how a checkpoint holds them.

Pixels are not saved: a prompt is the row that it came from, and is rendered again once there is data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl.datamodules.media.saved_media import restored_media, saved_media
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.turns import restored_turn, saved_turn
from longrl.types import Completion, Group, Prompt, Row, UnusableSample

logger = logging.getLogger(__name__)

SavedGroup = dict[str, Any]
"""A group as tensors and plain values."""


class WaitingGroups:
    """Groups of this rank that a later step trains on."""

    def __init__(self) -> None:
        self.carried: list[Group] = []
        """Too many for the step that sampled them."""
        self.prefetched: list[Group] | None = None
        """Sampled during the last update; None if nothing was."""
        self.unasked: list[Prompt] = []
        """That were to be sampled during the last update, had there been an engine."""
        self.restored: dict[str, list[SavedGroup]] = {}
        """Groups and rows of a checkpoint, until they are rendered."""

    def save(self) -> dict[str, list[SavedGroup]]:
        """All of them, by their kind."""
        saved = {
            "carried": [saved_group(group) for group in self.carried],
            "ahead": [saved_group(group) for group in self.prefetched or []],
            "unasked": [saved_row(prompt.row) for prompt in self.unasked],
        }
        # A run that is saved again before its first batch keeps what it was restored with.
        for name, groups in self.restored.items():
            saved[name] += groups
        return saved

    def load(self, by_rank: Sequence[Mapping[str, Sequence[SavedGroup]]], dp: Axis) -> None:
        """Takes what this rank had saved, or with another number of ranks its part of what all had."""
        for name in ("carried", "ahead", "unasked"):
            if len(by_rank) == dp.size:
                groups = list(by_rank[dp.rank].get(name, ()))
            else:
                all_groups = [group for of_rank in by_rank for group in of_rank.get(name, ())]
                groups = all_groups[dp.rank :: dp.size]
            self.restored[name] = groups

    def render_restored(self, render: Callable[[Row], Prompt], dp: Axis, sp_group: Axis = SINGLE_RANK) -> None:
        """Makes groups of those of a checkpoint. Every rank must call it.

        A file that is gone since costs its groups, on all ranks of `sp_group` alike, and not the run.
        """
        carried = restored_groups(self.restored["carried"], render, sp_group)
        ahead = restored_groups(self.restored["ahead"], render, sp_group)
        self.unasked = rendered_rows(self.restored.get("unasked", ()), render, sp_group)
        self.restored = {}
        # Groups carried over come first: the oldest are trained on before others.
        self.carried += carried
        if dp.max(len(ahead)):  # on all ranks or none, though one may have got no group
            self.prefetched = ahead


def saved_group(group: Group) -> SavedGroup:
    """A group with the row that its prompt came from."""
    saved: SavedGroup = {}
    for field in dataclasses.fields(group):
        saved[field.name] = getattr(group, field.name)
    # Plain values and tensors: `torch.load(weights_only=True)` reads nothing else.
    saved["prompt"] = saved_row(group.prompt.row)
    saved["completions"] = [saved_completion(completion) for completion in group.completions]
    return saved


def saved_row(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    saved = dataclasses.asdict(row)
    saved["metadata"] = dict(saved["metadata"])
    return saved


def saved_completion(completion: Completion) -> dict[str, Any]:
    """A completion as tensors and plain values; of media it was shown, where their pixels are."""
    saved = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion)}
    saved["media"] = [saved_media(item) for item in completion.media]
    saved["turns"] = [saved_turn(turn) for turn in completion.turns]
    return saved


def restored_groups(saved: Sequence[SavedGroup], render: Callable[[Row], Prompt], sp_group: Axis) -> list[Group]:
    """Those of the saved groups whose rows all ranks of a sequence-parallel group can still render."""
    groups = []
    for one in saved:
        group = None
        try:
            group = restored_group(one, render)
        except UnusableSample as error:
            row_id = one["prompt"]["id"]
            logger.warning("a group of row %r that a step left over is dropped: %s", row_id, error)
        # What one rank cannot read is dropped by all: they share its frames.
        num_lost = sp_group.max(group is None)
        if group is not None and not num_lost:
            groups.append(group)
    return groups


def rendered_rows(saved: Sequence[Mapping[str, Any]], render: Callable[[Row], Prompt], sp_group: Axis) -> list[Prompt]:
    """Those of the saved rows that all ranks of a sequence-parallel group can still render."""
    prompts = []
    for one in saved:
        prompt = None
        try:
            prompt = render(Row(**one))
        except UnusableSample as error:
            logger.warning("row %r, which was to be asked, is left out: %s", one["id"], error)
        if not sp_group.max(prompt is None) and prompt is not None:
            prompts.append(prompt)
    return prompts


def restored_group(saved: SavedGroup, render: Callable[[Row], Prompt]) -> Group:
    """The inverse of `saved_group`; `render` makes a prompt from a row."""
    fields = dict(saved)
    row = Row(**saved["prompt"])
    fields["prompt"] = render(row)
    fields["completions"] = [restored_completion(completion) for completion in saved["completions"]]
    return Group(**fields)


def restored_completion(saved: Mapping[str, Any]) -> Completion:
    """The inverse of `saved_completion`; one saved before there were environments has no media and no turns.

    Raises:
        UnusableSample: it was shown what no file has, and pixels are not saved.
    """
    media = tuple(restored_media(item) for item in saved.get("media", ()))
    if any(item.source is None for item in media):
        raise UnusableSample(None, "an environment showed it what no file has; give its frames a source")
    turns = tuple(restored_turn(turn) for turn in saved.get("turns", ()))
    return Completion(**{**saved, "media": media, "turns": turns})
