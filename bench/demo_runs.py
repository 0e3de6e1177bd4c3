"""What benchmarks share that train the demo's model: a folder of their own, printed commands, scores of a stage."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, Row, console

from longrl.commands.main import main as run_command
from longrl.evaluation.samples import RESULTS_FILE, TEST_FOLDER

CONFIGS = ROOT / "configs" / "demo"


def runs_folder(name: str, is_quick: bool) -> Path:
    """Where a benchmark's runs go: `runs/NAME`, without those of before, or of a quick one a temporary folder."""
    if is_quick:
        return Path(tempfile.mkdtemp(prefix=f"longrl_{name}_"))
    folder = ROOT / "runs" / name
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def run(*command: str) -> None:
    """A command of longrl's, printed and run in this process."""
    console.print(f"$ python -m longrl {shlex.join(command)}", soft_wrap=True, highlight=False)
    run_command(list(command))


def tested_scores(folder: Path) -> dict[str, Any]:
    """The scores that `test` has left in a run folder, of all questions as `overall`."""
    (condition,) = json.loads((folder / TEST_FOLDER / RESULTS_FILE).read_text())["conditions"].values()
    scores: dict[str, Any] = condition["scores"]
    return scores


def overall_row(folder: Path) -> Row:
    """Of them `accuracy`, the ends `low` and `high` of its 95 % interval (Wilson), and the number of questions `n`."""
    overall = tested_scores(folder)["overall"]
    return {field: overall[field] for field in ("accuracy", "low", "high", "n")}
