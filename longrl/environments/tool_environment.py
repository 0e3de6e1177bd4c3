"""`ToolEnvironment`: base of environments that answer with tools, which are methods."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.datamodules.loading.skips import CODE_ERRORS
from longrl.environments.environment import Observation, ToolResponse
from longrl.environments.tool_calls import RequestedCall, parse_tool_calls, quoted
from longrl.environments.tool_schemas import ToolError as ToolError, checked_arguments, tool_schema
from longrl.turns import ToolCall
from longrl.types import Frames, Row, UnusableSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """What a tool answers where that is more than a text."""

    content: tuple[str | Frames, ...]
    """Texts and media in the order in which they are shown."""
    span_s: tuple[float, float] | None = None
    """The part of a video that is shown, in seconds."""
    frame_times: tuple[float, ...] = ()
    """Seconds of the frames that are shown."""


class ToolEnvironment:
    """An environment whose tools are methods of a subclass.

    A tool has type hints, which are those of its arguments in JSON, and a docstring that says what it does, and under
    `Args:` what each argument is: chat templates show both to the policy. It returns a text, a number, anything that
    JSON can hold, `Frames`, or a `Shown`; it says no by a `ToolError`. Whatever else it raises is shown to the policy
    as an error, too; where the code is at fault (`CODE_ERRORS`, TypeError), a warning has the traceback, once.

    A turn without a call ends the completion.

    Args:
        max_calls: calls of a turn that are answered; further ones are told so.
    """

    tool_names: tuple[str, ...] = ()
    """Of the methods that are tools."""

    def __init__(self, max_calls: int = 4) -> None:
        if max_calls < 1:
            raise ValueError(f"max_calls must be at least 1, got {max_calls}; it counts the calls of a turn")
        self.max_calls = max_calls

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Schemas of the tools, from type hints and docstrings.

        Raises:
            ValueError: a tool lacks one of them.
        """
        return [self.schema(method) for method in self._methods().values()]

    def schema(self, method: Callable[..., Any]) -> dict[str, Any]:
        """Of a tool, as chat templates take it; a subclass may leave arguments out."""
        return tool_schema(method)

    def reset(self, row: Row) -> None:
        """Begins with a row."""

    def step(self, text: str) -> Observation | None:
        """The answers to a turn's calls, each with its error if it has one."""
        calls = parse_tool_calls(text)
        if not calls:
            return None
        responses = []
        for number, call in enumerate(calls):
            if number < self.max_calls:
                responses.append(self._answer(call))
                continue
            problem = f"a turn may have {self.max_calls} tool calls, got {len(calls)}; make the others in the next turn"
            responses.append(error_response(call.name, call.arguments, problem))
            break  # one answer for all that are too many
        return Observation(tuple(responses))

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {name: getattr(self, name) for name in self.tool_names}

    def _answer(self, call: RequestedCall) -> ToolResponse:
        start = time.perf_counter()
        try:
            shown = self._shown(call)
        except ToolError as error:
            problem = str(error)
        except UnusableSample as error:  # the remedy is for whoever runs this, not for the policy
            logger.warning("tool %r: %s", call.name, error)
            problem = f"{error.reason.partition(';')[0]}; ask for something else"
        except Exception as error:  # whatever a tool meets: no completion may end a run
            problem = f"{call.name} failed ({type(error).__name__}: {first_line(error)}); try other arguments"
            if isinstance(error, (*CODE_ERRORS, TypeError)):
                logger.warning("tool %r of %s failed", call.name, type(self).__name__, exc_info=True)
        else:
            seconds = time.perf_counter() - start
            made = ToolCall(call.name, call.arguments, None, seconds, shown.span_s, shown.frame_times)
            return ToolResponse(shown.content, made)
        return error_response(call.name, call.arguments, problem, time.perf_counter() - start)

    def _shown(self, call: RequestedCall) -> Shown:
        """What the tool answers.

        Raises:
            ToolError: the call cannot be read, or names no tool, or its arguments do not fit.
        """
        if call.error is not None:
            raise ToolError(call.error)
        methods = self._methods()
        if call.name not in methods:
            raise ToolError(f"there is no tool {quoted(call.name)}; use one of {', '.join(methods) or 'none'}")
        method = methods[call.name]
        result = method(**checked_arguments(self.schema(method), call.arguments, call.is_text))
        if isinstance(result, Shown):
            return result
        if isinstance(result, str | Frames):
            return Shown((result,))
        return Shown((json.dumps(result, ensure_ascii=False),))


def error_response(name: str, arguments: Mapping[str, Any], problem: str, seconds: float = 0.0) -> ToolResponse:
    """What the policy is told in the place of an answer."""
    problem = problem.encode("utf-8", "replace").decode()
    return ToolResponse((f"Error: {problem}",), ToolCall(name, arguments, problem, seconds))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, not too long; its type, if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
