"""`Environment`: what answers the turns of a completion, for instance with a part of the video at a higher frame rate.

An environment is small: it is copied between processes at every turn, so that a call that hangs can be killed and the
environment goes on as it was before. It holds what the row says and what its calls changed, no open files, no frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longrl.turns import ToolCall
from longrl.types import Frames, Row


@dataclass(frozen=True)
class ToolResponse:
    """What one call is answered with."""

    content: tuple[str | Frames, ...]
    """Texts and media in the order in which they are shown; errors are texts, too. Frames may lack their pixels where
    they have a `source`: then they are decoded only if no features of them are there (`rendering.render_observation`).
    """
    call: ToolCall
    """The call, with its error if it had one."""


@dataclass(frozen=True)
class Observation:
    """What an environment answers a turn with: a response for each of the turn's calls."""

    responses: tuple[ToolResponse, ...]


class Environment(Protocol):
    """The world of one completion.

    One instance serves one completion; `make` of `EnvironmentSettings` makes it, `reset` begins it. Nothing outlives
    the completion.
    """

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of the tools as chat templates take them: `{"type": "function", "function": {...}}`; may be ().

        Known before `reset`, and the same for all rows.
        """

    def reset(self, row: Row) -> None:
        """Begins with a row: its videos, subtitles and whatever else it says."""

    def step(self, text: str) -> Observation | str | None:
        """The answer to a turn of the policy.

        Args:
            text: of the turn, special tokens such as `<tool_call>` included, without the end token.

        Returns:
            None ends the completion; a text is an answer that no call asked for.

        Raises:
            Exception: whatever it raises is shown to the policy as an error, and logged once with its traceback; the
                environment then is as it was before the turn.
        """
