"""metrics.csv of a run: lines are appended, and a run that goes on continues the file it began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from longrl.io.append_csv import csv_line, cut_file, widen_file

FILE = "metrics.csv"


class CSVLog(Logger):
    """A line for every call, with a column for every name; `save_dir/name/version_N/metrics.csv`.

    Lightning's `CSVLogger` writes the whole file anew for each line. Here only a new name does so: the file is replaced
    by one with a longer head. Steps are logged in their order, so the first one that a process logs says where a
    resumed run goes on: lines of that step and later ones are taken out, for they are repeated.

    Args:
        save_dir: the run's folder.
        name: folder in it.
        continues: go on with the newest version there is; else begin another one.
    """

    def __init__(self, save_dir: str | Path, name: str = "logs", continues: bool = True) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._name = name
        self._continues = continues
        self._columns: list[str] = []
        """Of the file; none before the first line."""
        self._version: int | None = None
        self._num_lines = 0

    @property
    @override
    def name(self) -> str:
        return self._name

    @property
    @override
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    @override
    def version(self) -> int:
        """Number of the folder, chosen when it is first asked for."""
        if self._version is None:
            newest = newest_version(self._folder / self._name)
            self._version = newest if self._continues else newest + 1
            self._version = max(self._version, 0)
        return self._version

    @property
    @override
    def log_dir(self) -> str:
        folder = self._folder / self._name
        return str(folder / f"version_{self.version}")

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir, FILE)

    @override
    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": self._num_lines if step is None else step}
        for name, value in metrics.items():
            column = " ".join(name.split())  # a category of the data may hold a line's end
            row[column] = value.item() if isinstance(value, Tensor) else value
        if not self._columns:
            self._columns = cut_file(self.path, row["step"])
        new = [name for name in row if name not in self._columns]
        if new:
            widen_file(self.path, self._columns, new)
            self._columns += new
        line = csv_line(row.get(name, "") for name in self._columns)
        with self.path.open("ab") as file:
            file.write(line)
        self._num_lines += 1


def newest_version(folder: Path) -> int:
    """The largest number of the folders `version_N`; -1 without one."""
    numbers = [-1]
    for path in folder.glob("version_*"):
        digits = path.name.removeprefix("version_")
        if digits.isdecimal():
            numbers.append(int(digits))
    return max(numbers)
