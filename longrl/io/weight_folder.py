"""Are the files of a Hugging Face folder whole? Of an export its checksums say so, of others the files' own headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longrl.io.checksums import CHECKSUMS, check_folder, write_checksums

WEIGHTS = "*.safetensors"
FETCH_AGAIN = "fetch or export the folder again"


def write_weight_checksums(folder: Path) -> None:
    """Writes the sums of an export's weights; its other files may be edited."""
    write_checksums(folder, pattern=WEIGHTS)


def check_weight_files(folder: str | Path) -> None:
    """Compares weights with the folder's checksums, and looks at their headers; of a hub id it does nothing.

    Raises:
        ValueError: a file is torn, damaged or none; it is named.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    if (folder / CHECKSUMS).is_file():
        check_folder(folder)
    for file in sorted(folder.rglob(WEIGHTS)):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is torn or no safetensors file: its header does not fit its {file.stat().st_size} bytes "
                f"({error}); {FETCH_AGAIN}"
            ) from error


def local_weight_folder(folder: str, option: str, model: str) -> Path:
    """The path of a local folder with a config and whole safetensors weights; nothing is downloaded or unpickled.

    Args:
        folder: as it was given.
        option: the option's name, for errors.
        model: what lies in it, with its article.

    Raises:
        ValueError: it is no such folder.
    """
    path = Path(folder).expanduser()
    if not folder or not (path / "config.json").is_file():
        raise ValueError(
            f"{option} must be a local folder with {model}, but {folder!r} has no config.json (working folder: "
            f"{Path.cwd()}); download the model once and give its folder"
        )
    if not any(path.glob(WEIGHTS)):
        raise ValueError(
            f"{option}={folder!r} must have safetensors weights, and has none; convert them once, where you trust the "
            "files: pickles are never read here"
        )
    read_json_object(path / "config.json")
    check_weight_files(path)
    return path


def weight_names(folder: str | Path) -> list[str]:
    """Names of the tensors in a folder's files, from their headers; of a hub id none."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(Path(folder).rglob(WEIGHTS)):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names


def read_json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that must be an object.

    Raises:
        ValueError: it is empty or something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({str(error)[:100]}); {FETCH_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(content).__name__}; {FETCH_AGAIN}")
    return content
