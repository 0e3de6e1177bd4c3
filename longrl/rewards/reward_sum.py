"""The weighted sum of reward functions that fills a group's rewards."""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from longrl.io.functions import check_function, import_function
from longrl.rewards.batch import BatchReward
from longrl.rewards.frame_choice import frame_indices
from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.rewards.tasks import accuracy
from longrl.types import Completion, Group, Row

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ACCURACY_NAME = "accuracy"
"""The part that dynamic sampling looks at."""


@dataclass(frozen=True)
class RewardTerm:
    """One reward function and its weight.

    Example:
        `RewardTerm("longrl.rewards.accuracy", weight=0.9)`, `RewardTerm("my/rewards.py:brevity", name="brevity")`;
        in YAML a function with settings is `function: {class_path: longrl.rewards.SoftOverlong, init_args: {...}}`.
        Of pictures and videos: `RewardTerm("longrl.diffusion.rewards.generation.compressibility", frames_of="every 4")`.
    """

    function: str | Callable[[Any, Row], float]
    """A function, or where it is: an import path, or `file.py:function` from the working folder. It gets a `Completion`
    of text, or the frames of a generated picture or video, [F, 3, H, W] uint8 RGB, and the `Row` it was made for."""
    weight: float = 1.0
    name: str | None = None
    """Of the part in the logs; the function's own name when None."""
    frames_of: str = "all"
    """Which frames of a generated video the function sees: `all`, `first`, `last` or `every N`."""

    def __post_init__(self) -> None:
        frame_indices(1, self.frames_of)
        function = import_function(self.function, "reward") if isinstance(self.function, str) else self.function
        check_function(function, self.function, "reward")
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of reward {self.function!r} must be a finite number, got {self.weight}")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "name", self.name or _name_of(function))
        if function is accuracy and self.name != ACCURACY_NAME:
            raise ValueError(
                f"the part of longrl.rewards.accuracy must be named {ACCURACY_NAME!r}, for dynamic sampling looks at "
                f"it, got {self.name!r}; leave `name` out"
            )


@dataclass(frozen=True)
class RewardSum:
    """Reward = sum of weight * function(completion, row), each part kept for the logs.

    Of a completion that is no text but has `.frames`, a generated picture or video, functions get these frames.

    Example:
        ```python
        reward = RewardSum([RewardTerm("longrl.rewards.accuracy", 0.9), RewardTerm("my/rewards.py:brevity", 0.1)])
        num_failed = reward.score(groups)   # fills rewards, reward_parts and valid of each group
        ```
    """

    terms: list[RewardTerm]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a RewardSum needs at least one term, got none; configs/reward/ has examples")
        names = self.names
        if len(set(names)) < len(names):
            raise ValueError(f"the parts of a RewardSum must have different names, got {names}; set `name` of a term")

    @property
    def names(self) -> list[str]:
        """Names of the parts, in order."""
        return [str(term.name) for term in self.terms]

    def validate(self, max_completion_tokens: int) -> None:
        """Warns of parts that were set up for another limit of completions than the run's."""
        for term in self.terms:
            if isinstance(term.function, SoftOverlong | CosineLength):
                meant = term.function.max_completion_tokens
                if meant != max_completion_tokens:
                    logger.warning(
                        "reward %r was set up for at most %d tokens, but completions have at most %d; set its "
                        "max_completion_tokens to that",
                        term.name, meant, max_completion_tokens,
                    )  # fmt: skip

    def prepare(self) -> None:
        """Loads the models that rewards ask, before the first rollout rather than after it.

        Raises:
            ValueError: a package or folder is missing.
        """
        for term in self.terms:
            if isinstance(term.function, BatchReward):
                term.function.prepare()

    def score(self, groups: list[Group], errors: list[str] | None = None) -> int:
        """Fills `rewards`, `reward_parts` and `valid` of every group.

        A function that raises, or whose value is not a finite number, is logged with its sample; that completion gets
        reward 0 and is not valid, and the other parts keep their values.

        Args:
            groups: with completions.
            errors: gets a line about each failure.

        Returns:
            Number of completions with a failed part.
        """
        self.prepare()
        errors = [] if errors is None else errors
        columns = [_column(term, groups, errors) for term in self.terms]
        return sum(self._fill(group, [column[i] for column in columns]) for i, group in enumerate(groups))

    def _fill(self, group: Group, by_term: list[list[float | None]]) -> int:
        """Rewards of one group from the values of its completions, [number of terms][G]."""
        import torch

        table = list(zip(*by_term, strict=True))  # [G][number of terms]
        values = torch.tensor([[math.nan if v is None else v for v in row] for row in table], dtype=torch.float32)
        values = values.reshape(len(table), len(self.terms))  # [G, number of terms]
        valid = values.isfinite().all(dim=1)  # [G]
        weights = torch.tensor([term.weight for term in self.terms])
        parts: Tensor = values.nan_to_num(nan=0.0)
        group.rewards = (parts @ weights).where(valid, 0.0)
        group.reward_parts = {name: parts[:, i].clone() for i, name in enumerate(self.names)}
        group.valid = valid
        return int((~valid).sum())


def _column(term: RewardTerm, groups: list[Group], errors: list[str]) -> list[list[float | None]]:
    """One part of all completions, group by group; None after a failure."""
    assert callable(term.function)
    pairs = [(_judged(term, completion), group.prompt.row) for group in groups for completion in group.completions]
    judges: list[Callable[[], object]]
    if isinstance(term.function, BatchReward):
        judges = [partial(_given, value) for value in _all_at_once(term.function, pairs)]
    else:
        judges = [partial(term.function, *pair) for pair in pairs]
    found = iter(judges)
    return [
        [_value(term, group, completion, next(found), errors) for completion in group.completions] for group in groups
    ]


def _judged(term: RewardTerm, completion: Any) -> Any:
    """What the function gets: a completion of text as it is, of any other kind its frames."""
    if not isinstance(completion, Completion):
        frames = completion.frames
        return frames[frame_indices(len(frames), term.frames_of)]
    if term.frames_of != "all":
        raise ValueError(
            f"frames_of={term.frames_of!r} of reward {term.name!r} chooses frames of pictures and videos, but the "
            "completions are text; leave frames_of out"
        )
    return completion


def _all_at_once(function: BatchReward[Any], pairs: list[tuple[Any, Row]]) -> Sequence[float | Exception]:
    try:
        return function.score_all([completion for completion, _ in pairs], [row for _, row in pairs])
    except Exception as error:
        return [error] * len(pairs)


def _given(value: float | Exception) -> float:
    if isinstance(value, Exception):
        raise value
    return value


def _value(
    term: RewardTerm, group: Group, completion: Any, judge: Callable[[], object], errors: list[str]
) -> float | None:
    """One part of one completion; None after a failure, which is logged and kept."""
    try:
        value = float(judge())  # type: ignore[arg-type]  # what is no number raises
        if not abs(value) < 1e30:  # finite, in float32 too
            raise ValueError(f"a reward must be a finite number, got {value}")
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
        place = traceback.extract_tb(error.__traceback__)[-1]
        logger.warning(
            "reward %r failed on prompt %r (%s: %s, in %s line %d); the completion is left out of the loss. "
            "Its text: %r",
            term.name, group.prompt.id, type(error).__name__, error, place.filename, place.lineno, _said(completion),
        )  # fmt: skip
        return None
    return value


def _said(completion: Any) -> str:
    return completion.text if isinstance(completion, Completion) else f"({len(completion.frames)} frames)"


def _name_of(function: object) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # SoftOverlong -> soft_overlong
