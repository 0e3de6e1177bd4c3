"""Environments written for TRL and OpenEnv, as far as their protocols map; docs/environments.md says what does not."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from longrl.environments.environment import Observation, ToolResponse
from longrl.environments.tool_environment import ToolEnvironment
from longrl.io.functions import resolve_function
from longrl.turns import ToolCall
from longrl.types import Row

OPTION = "rollout.environment.options."


class TRLEnvironment(ToolEnvironment):
    """A class as TRL's `environment_factory` takes it: `reset(**columns)`, and each other public method is a tool.

    What `reset` returns stands before the answers to the first turn, for prompts are rendered before there is an
    environment. A turn without a call ends the completion.

    Args:
        environment: the class, by import path or `file.py:Class`.
        options: that it is made with.
        max_calls: of a turn.
    """

    def __init__(
        self,
        environment: Callable[..., Any] | str,
        options: Mapping[str, Any] | None = None,
        max_calls: int = 4,
    ) -> None:
        super().__init__(max_calls)
        self.environment = resolve_function(environment, OPTION + "environment", classes=True)(**(options or {}))
        public = [name for name in dir(self.environment) if not name.startswith("_") and name != "reset"]
        self.tool_names = tuple(name for name in public if inspect.ismethod(getattr(self.environment, name)))
        self.first = ""

    @override
    def reset(self, row: Row) -> None:
        """Begins with a row: its fields and whatever its metadata hold are the columns."""
        row_fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "draw"}
        columns = {**row_fields, "prompt": row.problem, "solution": row.answer, **row.metadata}
        self.first = self.environment.reset(**known_arguments(self.environment.reset, columns)) or ""

    @override
    def step(self, text: str) -> Observation | None:
        """The answers to a turn's calls."""
        observation = super().step(text)
        if observation is None or not self.first:
            return observation
        first, self.first = self.first, ""
        return Observation((ToolResponse((first,), ToolCall("")), *observation.responses))

    @override
    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {name: getattr(self.environment, name) for name in self.tool_names}


class OpenEnvEnvironment:
    """An environment of OpenEnv: `reset()`, and `step(action)` whose result has an observation, a reward and `done`.

    The turn of the policy, behind its thinking, is one field of the action; the observation is shown as text. After
    `done` the policy has one more turn.

    Args:
        environment: the class that runs the environment, by import path or `file.py:Class`; it is copied between
            processes, so a client that holds a connection will not do.
        action: the class of its actions.
        action_field: that takes the text.
        observation_field: that is shown; None shows all fields, as JSON.
        options: that the environment is made with.
    """

    tools: Sequence[Mapping[str, Any]] = ()

    def __init__(
        self,
        environment: Callable[..., Any] | str,
        action: Callable[..., Any] | str,
        action_field: str = "message",
        observation_field: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.environment = resolve_function(environment, OPTION + "environment", classes=True)(**(options or {}))
        self.action = action
        self.action_field = action_field
        self.observation_field = observation_field
        self.first = ""
        self.is_done = False

    def reset(self, row: Row) -> None:
        """Begins; what the environment's `reset` takes of the row's id, problem and metadata it is given."""
        columns = {"episode_id": row.id, "problem": row.problem, **row.metadata}
        result = self.environment.reset(**known_arguments(self.environment.reset, columns))
        self.first = self._text(result)

    def step(self, text: str) -> str | None:
        """What the environment shows behind a turn."""
        if self.is_done:
            return None
        make = resolve_function(self.action, OPTION + "action", classes=True)
        said = text.rpartition("</think>")[2].strip()
        result = self.environment.step(make(**{self.action_field: said}))
        self.is_done = bool(getattr(result, "done", False))
        shown = "\n".join(part for part in (self.first, self._text(result)) if part)
        self.first = ""
        return shown

    def _text(self, result: Any) -> str:
        """The observation of a result, which may be the observation itself."""
        observation = getattr(result, "observation", result)
        if observation is None:
            return ""
        if self.observation_field is not None:
            return str(getattr(observation, self.observation_field))
        if isinstance(observation, str):
            return observation
        fields = observation.model_dump() if hasattr(observation, "model_dump") else dict(vars(observation))
        shown = {name: value for name, value in fields.items() if name not in ("done", "reward", "metadata")}
        return json.dumps(shown, ensure_ascii=False, default=str)


def known_arguments(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Of some named values those that a function takes; all, if it takes any."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(columns)
    return {name: columns[name] for name in parameters if name in columns}
