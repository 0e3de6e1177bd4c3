"""What an evaluation's folder already holds, and whether a new evaluation may take its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.json"
SHOWN = 5
SAME = ("policy", "sampling", "seed", "questions")
"""Of results.json, what two evaluations of one folder agree in; how answers are scored and shown may change."""


def check_extends(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raises ValueError if `folder` has results that the evaluation `asked` would replace instead of extend.

    It extends results of the same policy, sampling, seed and questions whose conditions it asks as well, in the same
    reading; it may have further conditions, such as more `--frames` or the blind baseline.

    Args:
        folder: of the evaluation.
        asked: `policy`, `sampling`, `seed` and `questions` as results.json has them, and of each of the `conditions`
            its `reading`.
    """
    path = folder / RESULTS
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(asked))
    changed = [text for name in SAME for text in _changes(name, before[name], now[name])]
    for name, condition in before["conditions"].items():
        if name not in now["conditions"]:
            changed.append(f"{name!r} is not asked")
        else:
            changed += _changes(f"{name!r} reading", condition["reading"], now["conditions"][name]["reading"])
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"--out={folder} has the results of another evaluation ({'; '.join(changed[:SHOWN])}{more}); give this "
            f"one a folder of its own by --out, or delete {path} to replace them (answers that are there stay)"
        )


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    """Where two values of JSON differ, by the dotted names of their parts."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _changes(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{name} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
