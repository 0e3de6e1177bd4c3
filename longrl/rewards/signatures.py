"""Reward functions as other trainers call them: TRL's take columns of a batch, verl's a text and its ground truth."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.chat.event_loop import run_async
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.rewards.batch import BatchReward
from longrl.types import Completion, Row

TEXT_NAMES = ("solution_str", "predict_str")
"""The text in verl's functions, and in those of EasyR1 and Long-RL."""
SCORE_NAMES = ("score", "overall")
"""The value in a dict that they return."""
KNOWN_FORMS = (
    "(completion, row) -> float, for pictures and videos (frames, row) -> float; TRL's "
    "(prompts, completions, **columns) -> list; verl's (data_source, solution_str, ground_truth, extra_info) -> float"
)


@dataclass(frozen=True)
class ColumnReward(BatchReward[Any]):
    """A function of TRL: `(prompts, completions, **columns) -> list`, called with all completions of a step at once.

    A function with a parameter named `completions` is taken for one wherever a reward is named. It may ask for the
    columns `prompts`, `completions`, `completion_ids`, those of the rows (`id`, `problem`, `answer`, `task`,
    `category`, `reasoning`, `videos`, `images`, `audios`, `metadata`), `solution` and `ground_truth`, which are the
    answer, `question`, which is the problem, and every name in the metadata of the rows; with `**kwargs` it gets all.

    Example:
        ```yaml
        - function:
            class_path: longrl.rewards.ColumnReward
            init_args: {function: my_rewards.py:from_trl, conversational: true}
          name: from_trl
        ```
    """

    function: FunctionOrPath[Callable[..., Any]]
    conversational: bool = False
    """True gives prompts and completions as lists of messages, `[{"role": "assistant", "content": text}]`, as TRL does
    for conversational data sets; else they are texts, whatever form the records had."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", resolve_function(self.function, "reward"))

    @property
    def __name__(self) -> str:
        """The name of the part, unless the term has one."""
        return name_of(self.function)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raises ValueError if the function needs a column that a row does not have."""
        needed = [
            name
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.default is parameter.empty and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD,
                                                                            parameter.KEYWORD_ONLY)
        ]  # fmt: skip
        for row in rows:
            has = {*row_columns(row), "prompts", "completions", "completion_ids"}
            missing = [name for name in needed if name not in has]
            if missing:
                raise ValueError(
                    f"reward {self.__name__!r} needs the column {missing[0]!r}, which row {row.id!r} does not have; it "
                    f"has {', '.join(sorted(has))}. Add it to metadata of the records, or give it a default; a "
                    "function of one completion and its row has no parameter named completions"
                )

    def score_all(self, completions: Sequence[Any], rows: Sequence[Row]) -> list[Any]:
        """See `BatchReward.score_all`."""
        if not completions:
            return []
        # 1. What the function asks for.
        by_row = [row_columns(row) for row in rows]
        names = list(dict.fromkeys(name for columns in by_row for name in columns))
        columns: dict[str, list[Any]] = {name: [columns.get(name) for columns in by_row] for name in names}
        columns["prompts"] = [self._message("user", row.problem) for row in rows]
        columns["completions"] = [
            self._message("assistant", one.text) if isinstance(one, Completion) else one for one in completions
        ]
        columns["completion_ids"] = [
            list(map(int, one.token_ids)) if isinstance(one, Completion) else None for one in completions
        ]
        parameters = inspect.signature(self.function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            columns = {name: values for name, values in columns.items() if name in parameters}
        # 2. As many values as completions.
        values = self.function(**columns)
        if inspect.isawaitable(values):
            values = run_async(lambda: _awaited(values))
        values = list(values)
        if len(values) != len(completions):
            raise ValueError(
                f"reward {self.__name__!r} must return a value of each of the {len(completions)} completions, got "
                f"{len(values)}"
            )
        return values

    def _message(self, role: str, text: str) -> str | list[dict[str, str]]:
        return [{"role": role, "content": text}] if self.conversational else text


async def _awaited(values: Any) -> Any:
    return await values


@dataclass(frozen=True)
class ComputeScore:
    """A function of verl, `compute_score(data_source, solution_str, ground_truth, extra_info)`, or with some of these.

    It gets `data_source` of the row's metadata, or its task; the text, as `predict_str` too (EasyR1, Long-RL);
    `row.answer`; and the metadata with `id`, `question` and `task`. A dict that it returns has `score` or `overall`.
    """

    function: Callable[..., Any]

    @property
    def __name__(self) -> str:
        """The name of the part, unless the term has one."""
        return name_of(self.function)

    def __call__(self, completion: Completion, row: Row) -> Any:
        """The value of one completion."""
        extra_info = {**row.metadata, "id": row.id, "question": row.problem, "task": row.task}
        known = dict.fromkeys(TEXT_NAMES, completion.text) | {
            "data_source": row.metadata.get("data_source", row.task),
            "ground_truth": row.answer,
            "extra_info": extra_info,
        }
        parameters = inspect.signature(self.function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            known = {name: value for name, value in known.items() if name in parameters}
        result = self.function(**known)
        if inspect.isawaitable(result):
            result = run_async(lambda: _awaited(result))
        if not isinstance(result, dict):
            return result
        name = next((name for name in SCORE_NAMES if name in result), SCORE_NAMES[0])
        return result[name]


def row_columns(row: Row) -> dict[str, Any]:
    """A row's fields by the names that columns have in TRL and verl."""
    metadata = dict(row.metadata)
    aliases = {"question": row.problem, "solution": row.answer, "ground_truth": row.answer}
    names = ("id", "problem", "answer", "task", "category", "reasoning", "videos", "images", "audios")
    return aliases | metadata | {name: getattr(row, name) for name in names} | {"metadata": metadata}


def as_reward(function: Any) -> Any:
    """What calls a function in the form that its parameters' names tell: itself, `ColumnReward` or `ComputeScore`.

    Raises:
        ValueError: it can be called in none of the forms.
    """
    if isinstance(function, BatchReward):
        return function
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # written in C: a call will tell
        return function
    names = signature.parameters
    if "completions" in names:
        return ColumnReward(function)
    if any(name in names for name in TEXT_NAMES):
        return ComputeScore(function)
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"reward {name_of(function)!r} has the parameters {signature}, and cannot be called as a reward ({error}); "
            f"the forms are {KNOWN_FORMS}"
        ) from error
    return function


def name_of(function: Any) -> str:
    """A function's own name; of a partial its function's, of a callable object its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", None) or type(function).__name__)
