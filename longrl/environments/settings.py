"""Options of `rollout.environment`: which environment answers, and within which limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from longrl.environments.environment import Environment
from longrl.io.functions import FunctionOrPath
from longrl.io.number_ranges import COUNT, SECONDS, check_ranges


@dataclass(frozen=True)
class EnvironmentSettings:
    """An environment and the limits of what completions may ask of it.

    Example:
        `EnvironmentSettings("longrl.environments.video_tools.VideoTools", {"max_frames": 8}, max_turns=3)`
    """

    make: FunctionOrPath[Callable[..., Environment]]
    """A class or function that makes an `Environment`, by import path or `file.py:name`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it is called with."""
    max_turns: int = 6
    """Turns of the policy in a completion; the last one is not answered."""
    max_observed_tokens: int = 4096
    """Tokens that a completion is shown, over all its turns; an answer that does not fit is replaced by an error."""
    seconds_per_call: float = 30.0
    """After so long a turn's calls are cut, and the policy is told."""
    show_tools: bool = True
    """Have prompts describe the tools, as the chat template does; False where rows say what they are."""
    stop_at_call: bool = False
    """End a turn with the token `</tool_call>`, whether or not the policy would go on; one call per turn."""
    num_workers: int = 2
    """Processes per rank in which environments run."""

    def __post_init__(self) -> None:
        check_ranges(
            vars(self), "rollout.environment.",
            max_turns=COUNT, max_observed_tokens=COUNT, seconds_per_call=SECONDS, num_workers=COUNT,
        )  # fmt: skip
