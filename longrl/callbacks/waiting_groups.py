"""Groups that wait for a later step, and how a checkpoint holds them.

Pixels are not saved: a prompt is the row that it came from, and is rendered again once there is data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Prompt, Row

SavedGroup = dict[str, Any]
"""A group as tensors and plain values."""


class WaitingGroups:
    """Groups of this rank that a later step trains on."""

    def __init__(self) -> None:
        self.carried: list[Group] = []
        """Too many for the step that sampled them."""
        self.prefetched: list[Group] | None = None
        """Sampled during the last update; None if nothing was."""
        self.restored: dict[str, list[SavedGroup]] = {}
        """Groups of a checkpoint, until they are rendered."""

    def save(self) -> dict[str, list[SavedGroup]]:
        """All of them, by their kind."""
        saved = {
            "carried": [saved_group(group) for group in self.carried],
            "ahead": [saved_group(group) for group in self.prefetched or []],
        }
        # A run that is saved again before its first batch keeps what it was restored with.
        for name, groups in self.restored.items():
            saved[name] += groups
        return saved

    def load(self, by_rank: Sequence[Mapping[str, Sequence[SavedGroup]]], dp: Axis) -> None:
        """Takes what this rank had saved, or with another number of ranks its part of what all had."""
        for name in ("carried", "ahead"):
            if len(by_rank) == dp.size:
                groups = list(by_rank[dp.rank][name])
            else:
                all_groups = [group for of_rank in by_rank for group in of_rank[name]]
                groups = all_groups[dp.rank :: dp.size]
            self.restored[name] = groups

    def render_restored(self, render: Callable[[Row], Prompt], dp: Axis) -> None:
        """Makes groups of those of a checkpoint. Every rank must call it."""
        carried = [restored_group(saved, render) for saved in self.restored["carried"]]
        ahead = [restored_group(saved, render) for saved in self.restored["ahead"]]
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
    row = dataclasses.asdict(group.prompt.row)
    row["metadata"] = dict(row["metadata"])
    saved["prompt"] = row
    saved["completions"] = [dataclasses.asdict(completion) for completion in group.completions]
    return saved


def restored_group(saved: SavedGroup, render: Callable[[Row], Prompt]) -> Group:
    """The inverse of `saved_group`; `render` makes a prompt from a row."""
    fields = dict(saved)
    row = Row(**saved["prompt"])
    fields["prompt"] = render(row)
    fields["completions"] = [Completion(**completion) for completion in saved["completions"]]
    return Group(**fields)
