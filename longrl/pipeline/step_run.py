"""One run of a step: its options, the folder with a file per step, its report, and the replies it may ask for."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrl.chat.client import ReplyCache
from longrl.io.atomic import atomic_write, set_aside
from longrl.io.jsonl import read_jsonl, write_jsonl
from longrl.pipeline.config import PipelineConfig

logger = logging.getLogger(__name__)

Record = dict[str, Any]
STEPS = ("split", "caption", "timeline", "question", "validate", "rewrite", "filter", "export")
NAMES = ("1_clips", "2_captions", "3_timelines", "4_replies", "5_questions", "6_reasoning", "7_filtered")
FILES = {step: f"{name}.jsonl" for step, name in zip(STEPS, NAMES, strict=False)} | {"trace": "8_traces.jsonl"}
MORE_STEPS = ("trace",)
"""Those that `all` leaves out."""
MAX_LISTED = 1000
"""Problems that a report lists; it counts all."""


@dataclass
class StepReport:
    """Counts of what a step did, and what went wrong."""

    step: str
    max_failed_share: float = 1.0
    """Beyond it the step ends with an error."""
    items: int = 0
    """Items that there were."""
    done: int = 0
    failed: int = 0
    """Items without a result; the same command tries them again."""
    left: int = 0
    """Items that were not tried, for the budget is spent."""
    counts: Counter[str] = field(default_factory=Counter)
    """Everything worth a number, problems by kind among it."""
    problems: list[Record] = field(default_factory=list)
    """Which item had which problem."""
    calls: dict[str, float] = field(default_factory=dict)
    """Calls, replies from disk, failed attempts, tokens and cost."""
    forms: set[str] = field(default_factory=set)
    """What the replies that could not be used should have been."""
    started: float = field(default_factory=time.time)

    def add_problem(self, item: str, kind: str, text: str) -> None:
        """Counts and lists one."""
        self.counts[kind] += 1
        self.problems.append({"item": item, "kind": kind, "text": text[:500]})

    def check(self) -> None:
        """Ends a step before it writes half a result.

        Raises:
            ValueError: items are left, or too many failed.
        """
        if self.left:
            raise ValueError(
                f"{self.left} items of step {self.step} are left, for the budget is spent; raise --budget.max_calls, "
                "--budget.max_tokens or --budget.max_cost and run the same command: nothing answered is asked again"
            )
        if self.failed > self.max_failed_share * self.items:
            raise ValueError(
                f"{self.failed} of {self.items} items of step {self.step} failed, which is more than "
                f"--max_failed_share={self.max_failed_share:g}; reports/{self.step}.json lists them. The same command "
                f"tries them again{self._wanted()}"
            )

    def _wanted(self) -> str:
        """The forms that replies did not have, as the end of a sentence."""
        return f", asking anew; a usable reply is {' or '.join(sorted(self.forms))}" if self.forms else ""

    def to_json(self) -> str:
        """Returns the report as a file holds it; problems in the order of their items."""
        listed = sorted(self.problems, key=lambda problem: (problem["item"], problem["kind"]))
        values = {name: getattr(self, name) for name in ("step", "items", "done", "failed", "left")}
        values |= {"counts": dict(sorted(self.counts.items())), "calls": self.calls}
        values |= {"wanted": sorted(self.forms)} if self.forms else {}
        values |= {"seconds": round(time.time() - self.started, 1), "num_problems": len(listed)}
        values["problems"] = listed[:MAX_LISTED]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


class Workspace:
    """Folder in which each step reads and writes.

    Args:
        folder: `out` of the config; made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """A file or folder in it."""
        return self.folder / name

    def read(self, step: str) -> list[Record]:
        """Reads what a step wrote.

        Raises:
            ValueError: it has not run to its end.
        """
        path = self.path(FILES[step])
        if not path.is_file():
            raise ValueError(f"{path} is not there; run `python -m longrl pipeline {step}` with the same --out first")
        return read_jsonl(path)

    def write(self, step: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """The whole result of a step; see `_replace`."""
        return self._replace(self.path(FILES[step]), records)

    def write_beside(self, step: str, what: str, records: Iterable[Mapping[str, Any]]) -> Path:
        """Writes what a step left out, such as `5_questions.rejected.jsonl`."""
        return self._replace(self.path(FILES[step]).with_suffix(f".{what}.jsonl"), records)

    def _replace(self, path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
        """Writes a file in place of an earlier one, which keeps another name if it has lines that the new one lacks."""
        new = write_jsonl(path.with_name(f".{path.name}.new"), records)
        if path.is_file() and not _has_lines_of(new, path):
            logger.warning("%s has another result now; the earlier one is %s", path, set_aside(path).name)
        return new.replace(path)

    def write_report(self, report: StepReport) -> Path:
        """`reports/STEP.json`."""
        return atomic_write(self.path("reports") / f"{report.step}.json", report.to_json())


def _has_lines_of(new: Path, earlier: Path) -> bool:
    """True if every line of the earlier file is in the new one, in any order."""
    with new.open("rb") as now, earlier.open("rb") as before:
        return set(before) <= set(now)


@dataclass(frozen=True)
class StepRun:
    """Everything that a step works with."""

    config: PipelineConfig
    workspace: Workspace
    report: StepReport
    replies: ReplyCache | None = None
    """Replies and budget of a step that asks a model."""
    add_items: Callable[[int], Any] = lambda count: None
    """Tells the progress bar that so many more items are to be done."""
    finish_item: Callable[[], Any] = lambda: None
    """Tells it that one is done."""
