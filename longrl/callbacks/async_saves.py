"""How a checkpoint holds prompts that are being sampled: finished, half sampled, or waiting to be.

Pixels are not saved: a prompt is the row that it came from, and is rendered again once there is data.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longrl.engines.continuous import SamplingTask
from longrl.environments.trajectory import Trajectory
from longrl.strategies.axis import Axis
from longrl.types import Prompt, Row, UnusableSample

logger = logging.getLogger(__name__)

SavedPrompt = dict[str, Any]
"""A prompt and its completions as tensors and plain values."""


def saved_prompt(prompt: Prompt, num_tries: int, task: SamplingTask | None) -> SavedPrompt:
    """A prompt with all that was sampled of it; None: nothing was. The task must stand still."""
    row = dataclasses.asdict(prompt.row)
    row["metadata"] = dict(row["metadata"])
    saved: SavedPrompt = {"prompt": row, "num_tries": num_tries, "seed": None, "trajectories": []}
    if task is not None:
        saved["seed"] = task.seed
        for trajectory in task.trajectories:
            one = trajectory.saved()
            # An answer that is under way may have changed its environment already, and will be asked for once more.
            one["environment_state"] = task.states_before.get(trajectory, trajectory.environment_state)
            saved["trajectories"].append(one)
    return saved


def share_of_rank(by_rank: Sequence[Sequence[dict[str, Any]]], dp: Axis) -> list[dict[str, Any]]:
    """What a rank had saved, or with another number of ranks its part of what all had."""
    if len(by_rank) == dp.size:
        return list(by_rank[dp.rank])
    return [saved for of_rank in by_rank for saved in of_rank][dp.rank :: dp.size]


def restored_prompts(
    all_saved: Sequence[SavedPrompt],
    render: Callable[[Row], Prompt],
    begin: Callable[[Prompt], list[Trajectory]],
    sp_group: Axis,
) -> Iterator[tuple[SavedPrompt, Prompt, list[Trajectory]]]:
    """Each saved prompt, rendered, with its trajectories as they were; [] where nothing was sampled.

    A file that is gone since costs its prompt, on all ranks of `sp_group` alike, and not the run. Where the run now
    samples another number of completions, a prompt is asked anew. Every rank must go through it.

    Args:
        all_saved: of this rank.
        render: makes a prompt from a row.
        begin: a prompt's trajectories before their first token.
        sp_group: the ranks that share the prompts.
    """
    for saved in all_saved:
        row = Row(**saved["prompt"])
        prompt = None
        trajectories: list[Trajectory] = []
        try:
            rendered = render(row)
            begun = begin(rendered)
            if len(begun) == len(saved["trajectories"]):
                trajectories = begun
                _keep_length(trajectories, saved.get("max_completion_tokens"))
                for trajectory, one in zip(trajectories, saved["trajectories"], strict=True):
                    trajectory.restore(one)
            prompt = rendered
        except UnusableSample as error:
            logger.warning("row %r, whose completions were under way, is dropped: %s", row.id, error)
        # What one rank cannot read is dropped by all: they share its frames.
        num_lost = sp_group.max(int(prompt is None))
        if prompt is not None and not num_lost:
            yield saved, prompt, trajectories


def _keep_length(trajectories: Sequence[Trajectory], max_completion_tokens: int | None) -> None:
    """Has completions end where they would have, by the length of the step that they began in; None: as all do."""
    if max_completion_tokens is None:
        return
    for trajectory in trajectories:
        trajectory.sampling = dataclasses.replace(trajectory.sampling, max_completion_tokens=max_completion_tokens)
