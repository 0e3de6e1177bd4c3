"""What the config.yaml of a run's folder may name: a folder may come from a stranger, and what it names would be run.

A config that a user names by `--config` is the user's own and may name anything. One that is read because of the folder
it lies in may name classes and functions of longrl, and classes of the libraries below; no others are imported.
"""

from __future__ import annotations

import codecs
import importlib.machinery
import os.path
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from longrl.commands.parsers import find_line
from longrl.io.plain_yaml import MAX_CONFIG_CHARACTERS, load_yaml

OPTION = "--trust_run_config"
TRUST_HELP = "the config in the run's folder may name classes and functions of any module, which then run"
CHECKPOINT_OPTION = "--trust_checkpoint"
CHECKPOINT_HELP = "read checkpoints also if they name functions and classes, which may run any code"
OWN = "longrl"
ENVIRONMENTS = f"{OWN}.environments."
"""Where classes lie that `rollout.environment.make` may name."""
PROCESSES = ("Popen", "Process", "Pool")
"""Classes that start programs or functions; a few modules of libraries have them under their own names."""
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
DATA_KEYS = ("train", "val", "test", "source")
"""Options that name files of rows, which no parser reads as configs."""
CONFIG_ENDINGS = (".yaml", ".yml")
SERVER_KEYS = ("url", "urls")
"""Options that name servers, which are sent a key of the user's environment."""
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
UNSAFE_OPTIONS = ("trust_remote_code", "model", "tokenizer", "hf_config_path", "hf_overrides", "worker_extension_cls")
"""Of an engine's `options`, by which vLLM runs code of its caller's."""
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
    if isinstance(values, dict) and values.get("trust_checkpoint"):
        raise ValueError(
            f"{path} has trust_checkpoint: true, which the command line alone may say: such a checkpoint may run any "
            f"code. If the folder is yours, add {OPTION} true"
        )
    for key, text in _texts(values, ".", MAX_DEPTH):
        problem = _problem(key, text, path)
        if problem:
            name = key.removeprefix("..").replace("init_args.", "")
            line = find_line(path.read_text(encoding="utf-8", errors="replace"), name) if path.is_file() else None
            raise ValueError(
                f"{path}{f', line {line}' if line else ''}: {name} {problem} {text[:200]!r}, and the config in a run's "
                f"folder may name only what belongs to {OWN}, and classes of {', '.join(LIBRARIES)}, and servers of "
                f"this machine: it would be run, or be sent your keys. If the folder is yours, add {OPTION} true, or "
                "name a config of your own by --config"
            )


def _texts(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    """Every text of a config with its dotted key; of one that is YAML itself, which a parser would read, its texts."""
    if depth == 0:
        raise ValueError(f"{key[:100]} of a run's config is nested too deeply; write the config anew")
    if isinstance(value, str):
        yield key, value
        inner = _container(value)
        if inner is not None:
            yield from _texts(inner, key, depth - 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}", depth - 1)
            if key.endswith(".options") and not isinstance(item, str):
                yield f"{key}.{name}", str(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key, depth - 1)


def _problem(key: str, text: str, path: Path) -> str:
    """What is wrong with the text of a dotted key; empty if nothing."""
    *_, group, option = key.rsplit(".", 2)
    if group == "options" and option in UNSAFE_OPTIONS:
        return "is an engine's option,"
    if option in SERVER_KEYS and _is_elsewhere(text):
        return "names the server"
    if FILE_FUNCTION.fullmatch(text):
        return "names the file"
    if text.endswith(CONFIG_ENDINGS) or (option not in DATA_KEYS and _is_config(text, path)):
        return "names the further config"
    # An environment, or what one adapts, is called with options that the config has, too.
    is_environment = text.startswith(ENVIRONMENTS) and _is_allowed(text, functions=False)
    if (group, option) == ("environment", "make"):
        return "" if is_environment else "names"
    if ".environment.options." in key:
        return "names" if DOTTED.fullmatch(text) and _exists(text) and not is_environment else ""
    if option in CLASS_KEYS:
        return "" if _is_allowed(text, functions=False) else "names"
    if option in FUNCTION_KEYS:
        return "" if "." not in text or _is_allowed(text, functions=True) else "names"
    return "names" if _names_other(text) else ""


def _is_elsewhere(url: str) -> bool:
    """True unless an address is of this machine."""
    try:
        return urlsplit(url).hostname not in THIS_MACHINE
    except ValueError:
        return True


def _names_other(text: str) -> bool:
    """True of an import path that leads out of what may be named."""
    is_path = DOTTED.fullmatch(text) is not None and not text.endswith(DATA_ENDINGS)
    return is_path and _exists(text) and not _is_allowed(text, functions=True)


def _is_allowed(import_path: str, *, functions: bool) -> bool:
    *modules, name = import_path.split(".")
    is_class = name[:1].isupper() and name not in PROCESSES
    root = modules[0] if modules else ""
    is_named = (root == OWN and (functions or is_class)) or (root in LIBRARIES and is_class)
    return is_named and _is_module(modules)


def _is_module(names: Sequence[str]) -> bool:
    """True if import paths lead to a module's own file; `torch.hub.os` is what another module imports."""
    folders: Sequence[str] | None = None
    for depth in range(len(names)):
        if depth and folders is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(".".join(names[: depth + 1]), folders)
        if spec is None:
            return False
        folders = spec.submodule_search_locations
    return True


def _exists(import_path: str) -> bool:
    """True if there is a module of a path's first name; none is run to find out."""
    root = import_path.partition(".")[0]
    try:
        return root in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(root) is not None
    except (ImportError, ValueError):
        return True


def _is_config(text: str, path: Path) -> bool:
    """True if a text names a file, of whatever ending, that a parser would read as a config or a list of classes."""
    return any(_is_config_text(content, path) for content in _starts(text, path))


def _is_config_text(content: str, path: Path) -> bool:
    if len(content) > MAX_CONFIG_CHARACTERS or _container(content) is not None:
        return True
    lines = [line.strip() for line in content.splitlines()]
    return any(_names_other(line) or any(_starts(line, path)) for line in lines if line)


def _starts(text: str, path: Path) -> list[str]:
    """The starts of the files that a parser would take a text for, beside the config and in the working folder."""
    name = os.path.expanduser(re.sub("^file:/*", "/", text))
    return [_start(path.parent / name), _start(Path(name))]


def _start(file: Path) -> str:
    """The start of a file of text, enough to see that it is too long for a config; empty of another, or of none."""
    try:
        with file.open("rb") as opened:
            content = opened.read(4 * MAX_CONFIG_CHARACTERS + 4)
        return codecs.getincrementaldecoder("utf-8")().decode(content)
    except (OSError, ValueError):
        return ""


def _container(text: str) -> Any:
    """The mapping or list that a text is in YAML; None of any other."""
    if len(text) > MAX_CONFIG_CHARACTERS or not set(text) & set(":-[{"):
        return None
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return None
    return value if isinstance(value, dict | list) else None
