"""Which prompts are asked, trained on and given up where sampling goes on over several updates: numbers in and out.

Ages count rollouts: how many of the trainer's steps on rollouts lie between a token's weights and the step that would
train on it now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_TRIES = 3
"""So often a prompt is asked before it is dropped."""


@dataclass(frozen=True)
class AskedState:
    """A prompt that was asked, and how far it is."""

    number: int
    """Its place in the order in which prompts were asked."""
    age: int
    """Of its oldest token; 0 before one."""
    is_finished: bool
    """All its completions have ended."""


def age_of(version: int | None, step: int, steps_per_rollout: int) -> int:
    """Rollouts between the optimizer step whose weights drew a token and a later one; 0 of no token.

    Example:
        `age_of(4, step=6, steps_per_rollout=2)` is 1.
    """
    return 0 if version is None else -((version - step) // steps_per_rollout)


def num_to_ask(max_staleness: int, num_groups: int, num_asked: int) -> int:
    """Prompts that may be asked now: k + 1 times a step's groups at most, so that all get their turn in time.

    The bound is that of AReaL (arXiv:2505.24298, eq. 3).

    Args:
        max_staleness: k, rollouts.
        num_groups: of a step.
        num_asked: prompts that were asked and are neither trained on nor dropped; those of the step that is being
            prepared are not trained on yet.
    """
    return max(0, (max_staleness + 1) * num_groups - num_asked)


def oldest_finished(states: Sequence[AskedState], count: int) -> list[int]:
    """Numbers of the finished prompts whose turn it is: those with the oldest tokens, of these the first asked."""
    finished = [state for state in states if state.is_finished]
    finished.sort(key=lambda state: (-state.age, state.number))
    return [state.number for state in finished[:count]]


def too_old(states: Sequence[AskedState], max_staleness: int) -> list[int]:
    """Numbers of the prompts that no step may train on any more, in the order in which they were asked."""
    return sorted(state.number for state in states if state.age > max_staleness)
