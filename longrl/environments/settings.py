"""Options of `rollout.environment`: which environment answers, and within which limits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrl.environments.environment import Environment
from longrl.io.functions import FunctionOrPath
from longrl.io.number_ranges import COUNT, SECONDS, check_ranges
from longrl.types import SamplingParams


@dataclass(frozen=True)
class EnvironmentSettings:
    """An environment and the limits of what completions may ask of it.

    Example:
        `EnvironmentSettings("longrl.environments.video_tools.VideoTools", {"max_frames": 8}, max_turns=3)`
    """

    make: FunctionOrPath[Callable[..., Environment]]
    """A class or function that makes an `Environment`, by import path or `file.py:name`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that `make` is called with."""
    max_turns: int = 6
    """Turns of the policy in a completion; the last one is not answered."""
    max_observed_tokens: int = 4096
    """Tokens that a completion is shown, over all its turns; an answer that does not fit is replaced by an error."""
    seconds_per_call: float = 30.0
    """For all calls of a turn together, decoding included: then its process is killed, and the policy is told. Starting
    processes does not count."""
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

    def identity(self) -> dict[str, Any]:
        """All that decides what is answered, as plain values: of a file of the user's own its content, too."""
        make = self.make if isinstance(self.make, str) else f"{self.make.__module__}.{self.make.__qualname__}"
        values = {"make": make, "options": dict(self.options), "max_turns": self.max_turns}
        values |= {"max_observed_tokens": self.max_observed_tokens, "seconds_per_call": self.seconds_per_call}
        values |= {"stop_at_call": self.stop_at_call}
        if ":" in make:
            file, _, name = make.rpartition(":")
            values["make"] = f"{Path(file).name}:{name}"
            values["file"] = hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
        return values


def with_observed(sampling: SamplingParams, settings: EnvironmentSettings | None) -> SamplingParams:
    """The same with as many tokens as a completion may have with all that it is shown, for limits of lengths."""
    if settings is None:
        return sampling
    return replace(sampling, max_completion_tokens=sampling.max_completion_tokens + settings.max_observed_tokens)
