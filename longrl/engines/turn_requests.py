"""Turns on their way through an engine: what samplers of completions ask of engines that take requests."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from typing import Any, Protocol

from longrl.environments.trajectory import Trajectory


class TurnRequests(Protocol):
    """Requests that an engine is answering, one for each trajectory that is sampled."""

    def add(self, trajectory: Trajectory, request: dict[str, Any], params: dict[str, Any]) -> None:
        """Sends a trajectory's turn on its way.

        Args:
            trajectory: whose turn it is.
            request: see `turn_request`.
            params: see `turn_arguments`.
        """

    def finished(self, answers: Collection[Future[Any]]) -> list[tuple[Trajectory, dict[str, Any]]]:
        """Turns that have ended, as `completion_fields` gives them; may be none.

        It waits if there is nothing else to do, until a turn ends or one of `answers` has come.
        """


class ContinuousRequests(TurnRequests, Protocol):
    """Requests over several updates: each answer says in `version` which optimizer step's weights sampled it.

    One thread adds requests and takes answers.
    """

    @property
    def num_pending(self) -> int:
        """Turns that were added and have not been given by `finished`."""

    def cut(self) -> None:
        """Ends early what is being sampled; any thread may call it.

        `finished` gives such a turn soon, with the tokens that it has, perhaps none, and `finish_reason` "cut", unless
        it had ended meanwhile. A request that reaches the engine later is not cut: who wants none under way calls again
        until none is pending.
        """
