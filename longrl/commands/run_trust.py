"""What the config.yaml of a run's folder may name: a folder may come from a stranger, and what it names would be run.

A config that a user names by `--config` is the user's own and may name anything. One that is read because of the folder
it lies in may name classes and functions of longrl, and classes of the libraries below; no others are imported.
"""

from __future__ import annotations

import importlib.machinery
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longrl.commands.parsers import find_line

OPTION = "--trust_run_config"
TRUST_HELP = "the config in the run's folder may name classes and functions of any module, which then run"
OWN = "longrl"
LIBRARIES = ("lightning", "torch", "transformers", "diffusers")
"""Packages whose classes may be named, but no functions: `torch.hub.load` is one."""
CLASS_KEYS = ("class_path",)
FUNCTION_KEYS = (
    "function", "row_function", "rule", "steps", "select", "advantage", "surrogate", "kl", "correction",
    "token_weights", "dynamics", "window",
)  # fmt: skip
"""Keys whose texts are import paths whatever they look like."""
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
FILE_FUNCTION = re.compile(r".*\.py:[A-Za-z_]\w*", re.DOTALL)
DATA_ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet", "txt", "mp4", "ckpt", "safetensors", "jinja", "html", "png")
"""Ends of names of files, which look like import paths: `train.jsonl`."""
CONFIG_ENDINGS = (".yaml", ".yml")
MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 100


def is_trusted(args: Sequence[str]) -> bool:
    """True if a command line says that the config of a run's folder may name anything."""
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name == OPTION:
            return (value if equals else following).lower() == "true"
    return False


def check_run_config(values: Any, path: Path, trusted: bool = False) -> None:
    """Raises ValueError if a config, read because it lies in a run's folder, names what a stranger could run code by.

    Nothing is imported.

    Args:
        values: of the config, or of the part of it that is used.
        path: of the file.
        trusted: the user said that it may.
    """
    if trusted:
        return
    for key, text in _texts(values, ".", MAX_DEPTH):
        problem = _problem(key.rpartition(".")[2], text, path)
        if problem:
            name = key.removeprefix("..").replace("init_args.", "")
            line = find_line(path.read_text(encoding="utf-8", errors="replace"), name) if path.is_file() else None
            raise ValueError(
                f"{path}{f', line {line}' if line else ''}: {name} {problem} {text[:200]!r}, and the config in a run's "
                f"folder may name only what belongs to {OWN}, and classes of {', '.join(LIBRARIES)}: it would be run. "
                f"If the folder is yours, add {OPTION} true, or name a config of your own by --config"
            )


def _texts(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    """Every text of a config with its dotted key, names of options included."""
    if depth == 0:
        raise ValueError(f"{key[:100]} of a run's config is nested too deeply; write the config anew")
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}", depth - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key, depth - 1)


def _problem(option: str, text: str, path: Path) -> str:
    """What is wrong with a text; empty if nothing."""
    if FILE_FUNCTION.fullmatch(text):
        return "names the file"
    if "class_path" in text:  # a config in a string, which the parser would read
        return "holds the config"
    if text.endswith(CONFIG_ENDINGS) or _is_config(text, path):
        return "names the further config"
    if option in CLASS_KEYS:
        return "" if _is_allowed(text, functions=False) else "names"
    if option in FUNCTION_KEYS:
        return "" if "." not in text or _is_allowed(text, functions=True) else "names"
    is_path = DOTTED.fullmatch(text) is not None and not text.endswith(DATA_ENDINGS)
    return "names" if is_path and _exists(text) and not _is_allowed(text, functions=True) else ""


def _is_allowed(import_path: str, *, functions: bool) -> bool:
    root, _, rest = import_path.partition(".")
    name = rest.rpartition(".")[2]
    is_class = name[:1].isupper()
    return (root == OWN and (functions or is_class)) or (root in LIBRARIES and is_class)


def _exists(import_path: str) -> bool:
    """True if there is a module of a path's first name; none is run to find out."""
    root = import_path.partition(".")[0]
    try:
        return root in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(root) is not None
    except (ImportError, ValueError):
        return True


def _is_config(text: str, path: Path) -> bool:
    """True if a text names a JSON file with class paths."""
    if not text.endswith(".json"):
        return False
    for file in (path.parent / text, Path(text)):
        try:
            with file.open("rb") as opened:
                return b"class_path" in opened.read(MAX_CONFIG_BYTES)
        except (OSError, ValueError):
            continue
    return False
