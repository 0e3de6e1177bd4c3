"""Whether a folder held the weights of a model: transformers fills what is missing with random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def check_loaded(
    folder: str | Path,
    missing_keys: Iterable[str],
    unexpected_keys: Iterable[str],
    mismatched_keys: Iterable[tuple[str, Any, Any]],
    **other: Any,
) -> None:
    """Raises ValueError with the first names that a folder lacks, that it has too many, or whose shapes differ.

    Args:
        folder: what was read, or its hub id.
        missing_keys: as `from_pretrained(..., output_loading_info=True)` of transformers tells them.
        unexpected_keys: the same.
        mismatched_keys: (name, shape found, shape of the model).
        other: what else it tells.
    """
    problems = [f"{key} is missing" for key in missing_keys] + [f"{key} is unknown" for key in unexpected_keys]
    problems += [f"{key} is {list(got)} instead of {list(want)}" for key, got, want in mismatched_keys]
    if problems:
        raise ValueError(
            f"{folder} does not hold the weights its config.json describes: {'; '.join(sorted(problems)[:5])} "
            f"({len(problems)} differences); fetch the folder again, or correct its config.json"
        )
