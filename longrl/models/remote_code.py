"""Code that a released model folder names in its configs (`auto_map`): copied beside an export, never run or imported.

transformers runs it, with `trust_remote_code=True`, when such a folder is loaded by an Auto class; an export that names
code it does not have can be loaded by nobody but us.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAMING_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
OTHER_REPOSITORY = "--"
"""In a name of `auto_map` between the repository that transformers fetches the code from and the module."""


def copy_named_code(source: str, folder: Path) -> None:
    """Copies the Python files of a model to an export whose configs name some, and warns of those that are missing.

    Args:
        source: folder or hub id that the export's configs are from.
        folder: the export.
    """
    if not _missing(folder):
        return
    code = _code_of(source)
    if code is not None:
        here = folder.resolve()  # which may lie in the model's folder
        for file in [file for file in code.rglob("*.py") if here not in file.resolve().parents]:
            target = folder / file.relative_to(code)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    missing = _missing(folder)
    if missing:
        logger.warning(
            "the export's configs name code that is not in %s: %s; transformers loads the export only with it, so add "
            "the .py files of the released model to the exported folder", source, ", ".join(missing)
        )  # fmt: skip


def _code_of(source: str) -> Path | None:
    """Folder with a model's Python files; None if they cannot be fetched."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.py"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        logger.warning("the code of %s cannot be fetched (%s)", source, type(error).__name__)
        return None


def _missing(folder: Path) -> list[str]:
    """Files that configs of a folder name and that are not there."""
    configs = [path for path in folder.rglob("*.json") if path.name in NAMING_FILES]
    files = {path.parent / f"{module}.py" for path in configs for module in _named_modules(path)}
    return sorted(str(file.relative_to(folder)) for file in files if not file.is_file())


def _named_modules(config: Path) -> Iterable[str]:
    """Modules beside a config that its `auto_map` names: {"AutoModel": "modeling_vila.VILAForCausalLM"}."""
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    for value in (values.get("auto_map") or {}).values():
        # A tokenizer has two classes, of which one may be null.
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and OTHER_REPOSITORY not in name:
                yield name.partition(".")[0]
