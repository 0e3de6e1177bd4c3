"""Published figures of a benchmark, from YAML files that say where each stands and how it was measured.

What a source does not say is left out of the file, and the scoreboard says that it is not said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longrl.evaluation.settings import Setting
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, Range, check_ranges
from longrl.io.plain_yaml import load_yaml
from longrl.io.text_files import read_utf8

PERCENT: Range = (0, 100)
TEXTS = ("model", "prompt", "frame_rule", "scored_by")
NUMBERS: Mapping[str, Range] = {
    "frames": COUNT, "frames_at_most": COUNT, "fps": (1e-6, 1e6), "media_tokens_at_most": COUNT,
    "max_pixels": COUNT, "temperature": NOT_NEGATIVE, "max_completion_tokens": COUNT, "num_generations": COUNT,
    "questions": COUNT,
}  # fmt: skip
FLAGS = ("subtitles", "thinking", "tools")


@dataclass(frozen=True)
class PublishedFigure:
    """An accuracy that somebody published."""

    accuracy: float
    """Between 0 and 1; files have percent."""
    source: str
    """Paper with its table or section, model card, or repository and commit."""
    setting: Setting
    """How it was measured, as far as the source says."""
    categories: dict[str, float] = field(default_factory=dict)
    """Category or value of a breakdown -> accuracy."""
    note: str = ""

    @property
    def model(self) -> str:
        """Who answered."""
        return self.setting.model or "unnamed"


@dataclass(frozen=True)
class PublishedBenchmark:
    """The figures of one file."""

    names: tuple[str, ...]
    """The benchmark, as `name` of an evaluation has it, and by other names."""
    figures: tuple[PublishedFigure, ...]

    def is_about(self, names: Iterable[str]) -> bool:
        """True if it has figures of a benchmark that goes by one of these names."""
        known = {_plain(name) for name in self.names}
        return any(_plain(name) in known for name in names)


def read_published(paths: Iterable[str | Path]) -> list[PublishedBenchmark]:
    """The figures of YAML files, or of all YAML files in folders.

    Raises:
        ValueError: a file is missing or not as docs/scoreboard.md says.
    """
    found = []
    for path in map(Path, paths):
        files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"--published={path} is no YAML file and no folder of such; configs/published/ has some")
        found += [read_benchmark(file) for file in files]
    return found


def read_benchmark(path: Path) -> PublishedBenchmark:
    """The figures of one file."""
    try:
        content = load_yaml(read_utf8(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    where = f"{path}: "
    if not isinstance(content, dict) or content.keys() != {"benchmark", "figures"}:
        raise ValueError(f"{where}a file of published figures has `benchmark` and `figures`; see docs/scoreboard.md")
    names, figures = content["benchmark"], content["figures"]
    names = [names] if isinstance(names, str) else names
    if not _is_list_of(names, str) or not _is_list_of(figures, dict):
        raise ValueError(f"{where}`benchmark` must be a name or several, and `figures` a list of mappings")
    read = tuple(_figure(values, f"{where}figures[{index}].") for index, values in enumerate(figures))
    return PublishedBenchmark(tuple(names), read)


def _figure(values: Mapping[str, Any], where: str) -> PublishedFigure:
    known = ("accuracy", "source", "note", "categories", *TEXTS, *NUMBERS, *FLAGS)
    unknown = [str(name) for name in values if name not in known]
    missing = [name for name in ("model", "accuracy", "source") if values.get(name) is None]
    if unknown or missing:
        problem = f"unknown {', '.join(unknown)}" if unknown else f"it lacks {', '.join(missing)}"
        raise ValueError(f"{where[:-1]}: {problem}; a figure has {', '.join(known)}")
    for name in ("source", "note", *TEXTS):
        if not isinstance(values.get(name, ""), str):
            raise ValueError(f"{where}{name} must be a text, got {values[name]!r}; put it in quotes")
    for name in FLAGS:
        if not isinstance(values.get(name, False), bool):
            raise ValueError(f"{where}{name} must be true or false, got {values[name]!r}; leave out what is not said")
    categories = values.get("categories", {})
    if not isinstance(categories, dict):
        raise ValueError(f"{where}categories must be a mapping of names to percents, got {categories!r}")
    numbers = {name: values[name] for name in NUMBERS if name in values}
    for name, value in (*numbers.items(), ("accuracy", values["accuracy"]), *categories.items()):
        if isinstance(value, bool):
            raise ValueError(f"{where}{name} must be a number, got {value!r}")
    check_ranges(values, where, accuracy=PERCENT)
    check_ranges(numbers, where, **{name: NUMBERS[name] for name in numbers})
    check_ranges(categories, f"{where}categories.", **{str(name): PERCENT for name in categories})
    setting = Setting(**{name: values[name] for name in (*TEXTS, *NUMBERS, *FLAGS) if name in values})
    shares = {str(name): value / 100 for name, value in categories.items()}
    return PublishedFigure(values["accuracy"] / 100, values["source"], setting, shares, values.get("note", ""))


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _plain(name: str) -> str:
    """A benchmark's name without case, spaces and marks: Video-MME is videomme."""
    return "".join(filter(str.isalnum, name.lower()))


def to_dict(figure: PublishedFigure) -> dict[str, Any]:
    """Returns a figure as JSON, without what is not said."""
    setting = {name: value for name, value in dataclasses.asdict(figure.setting).items() if value is not None}
    return {
        "model": figure.model, "accuracy": figure.accuracy, "source": figure.source, "note": figure.note,
        "categories": figure.categories, "setting": setting,
    }  # fmt: skip
