"""Groups that wait for a later step, as a checkpoint holds them: pixels are not saved, prompts are rendered again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Prompt, Row


def saved_group(group: Group) -> dict[str, Any]:
    """A group as tensors and plain values, its prompt as the row it came from."""
    saved = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    row = dataclasses.asdict(group.prompt.row)
    row["metadata"] = dict(row["metadata"])
    saved["prompt"] = row
    saved["completions"] = [dataclasses.asdict(completion) for completion in group.completions]
    return saved


def restored_group(saved: Mapping[str, Any], render: Callable[[Row], Prompt]) -> Group:
    """The inverse of `saved_group`; `render` makes a prompt from a row."""
    fields = dict(saved)
    fields["prompt"] = render(Row(**saved["prompt"]))
    fields["completions"] = [Completion(**completion) for completion in saved["completions"]]
    return Group(**fields)


def items_of_rank(by_rank: Sequence[Sequence[Any]], dp: Axis) -> list[Any]:
    """What this rank had saved, or with another number of ranks its part of what all had."""
    if len(by_rank) == dp.size:
        return list(by_rank[dp.rank])
    items = [item for of_rank in by_rank for item in of_rank]
    return items[dp.rank :: dp.size]
