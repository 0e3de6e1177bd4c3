"""Options as people read them: a parser's groups, the fields within them, and the classes that an option can name."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

import longrl
from longrl.commands.parsers import described_fields

CONFIGS = Path(longrl.__file__).parents[1] / "configs"
WIDTH = 100
INDENT = " " * 6
NOT_SHOWN = ("_ActionConfigLoad", "_ActionHelpClassPath", "ActionLink", "_HelpAction")
"""Kinds of actions that set no option: those of groups, of help and of links."""
CONFIG_HELP = """A YAML file of options. Several compose: later ones win, key by key, and options of the command line
win over files."""
PACKAGES = (
    "longrl.callbacks", "longrl.chat", "longrl.datamodules", "longrl.diffusion", "longrl.engines",
    "longrl.environments", "longrl.evaluation", "longrl.models", "longrl.modules", "longrl.rewards",
    "longrl.strategies",
)  # fmt: skip
"""Where the classes are that a config can name."""
WITHIN_VLLM = ("_vllm", ".vllm_extension")
"""Modules of vLLM's own processes, which load all of vLLM."""
OWN_PARTS = ("longrl.commands", "longrl.testing")
"""Packages whose subclasses no config names."""
KINDS = ("true or false", "int", "float", "text", "", "null")
"""The order of the kinds of values that an option takes; "" stands for all others."""
ALWAYS_THERE = (
    "Checkpoint", "DiffusionRolloutCallback", "RandomState", "RolloutCallback", "StepProfile", "Watchdog",
)  # fmt: skip
"""Callbacks of every run, which have options of their own or need none."""
ORDER = ("", "data", "model", "rollout", "checkpoint", "watchdog", "trainer")
"""Groups of options as they are shown; all others come between the first and the second."""


def import_classes() -> None:
    """Imports all modules whose classes a config can name, so that they are known as subclasses."""
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(WITHIN_VLLM):
                with contextlib.suppress(ImportError):  # of an extra that is not installed
                    importlib.import_module(module.name)


# ---- options ----


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or a field within one."""

    name: str
    type: Any
    default: Any
    help: str
    required: bool
    classes: Sequence[type] = ()
    """Those that its value can be an instance of."""


def options_of(parser: ArgumentParser) -> list[Option]:
    """The options of a parser, with the fields of those that are dataclasses; equal fields stand at the first alone."""
    return list(_options(parser, {}))


def _options(parser: ArgumentParser, shown: dict[type, str]) -> Iterator[Option]:
    for action in parser._actions:
        kind = type(action).__name__
        if kind in NOT_SHOWN or action.help == argparse.SUPPRESS:
            continue
        names = [name for name in action.option_strings if not name.endswith("+")]
        name = ", ".join(names) or str(action.metavar or action.dest)
        if kind == "ActionConfigFile":
            yield Option(name, "FILE.yaml", None, CONFIG_HELP, False)
            continue
        hint = getattr(action, "_typehint", action.type)
        classes = classes_of(hint)
        first = [shown[one] for one in classes if one in shown]
        also = f" Its fields are those of {first[0]}." if first else ""
        text = f"{(action.help or '').rstrip()}{also}"
        yield Option(name, _values(action, hint), action.default, text, action.required, classes)
        for one in classes:
            if is_closed(one) and one not in shown:
                shown[one] = name
                yield from _options(class_parser(one, action.dest), shown)


def classes_of(hint: Any) -> list[type]:
    """The classes that a value can be an instance of, or the items of a list; what a function returns is none."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType, list):
        return [one for part in get_args(hint) for one in classes_of(part)]
    is_named = inspect.isclass(hint) and hint.__module__.startswith(("longrl.", "lightning."))
    return [hint] if origin is None and is_named else []


def is_closed(one: type) -> bool:
    """True of a dataclass of longrl without subclasses, whose fields are options themselves."""
    subclasses: list[type] = one.__subclasses__()
    ours = [below for below in subclasses if below.__module__.startswith("longrl.")]
    return dataclasses.is_dataclass(one) and not ours and one.__module__.startswith("longrl.")


def class_parser(one: type, prefix: str | None = None) -> ArgumentParser:
    """A parser of what a class takes."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(one, prefix, fail_untyped=False, sub_configs=True)
    return parser


@functools.cache
def options_of_class(one: type) -> Sequence[Option]:
    """What a class takes."""
    with described_fields():
        return options_of(class_parser(one))


def _values(action: argparse.Action, hint: Any) -> str:
    if type(action).__name__ == "ActionYesNo":
        return "true or false"
    if action.choices is not None and not isinstance(action.choices, dict):
        return " or ".join(map(str, action.choices))
    return "" if action.nargs == 0 or type(action).__name__ == "_ActionPrintConfig" else type_text(hint)


def type_text(hint: Any) -> str:
    """A type in the words of a help page, such as `int or null`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if hint is None:  # plain argparse's
        return "text"
    if hint is bool:
        return "true or false"
    if origin in (Union, types.UnionType):
        parts = sorted(map(type_text, args), key=_place_of_kind)
        return " or ".join(dict.fromkeys(" or ".join(parts).split(" or ")))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is not None and inspect.isclass(origin):
        inner = ", ".join("..." if one is ... else type_text(one) for one in args if not isinstance(one, list))
        return f"{origin.__name__.lower()}[{inner}]" if origin in (list, dict, tuple) else origin.__name__.lower()
    return {"str": "text"}.get(getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint)))


def _place_of_kind(kind: str) -> int:
    """Where a kind of value stands among others: a union has the order of whichever equal one was made first."""
    return KINDS.index(kind if kind in KINDS else "")


def render(option: Option) -> str:
    """An option, what it may be, its default and its description."""
    facts = [option.type] if option.type else []
    if option.required:
        facts.append("required")
    elif option.default != argparse.SUPPRESS and (option.default is not None or "null" in option.type):
        facts.append(f"default {_default_text(option.default)}")
    head = f"  {option.name}"
    about = ", ".join(facts)
    lines = [f"{head}  ({about})" if about else head]
    if len(lines[0]) > WIDTH:
        lines = [head, *_wrapped(f"({about})")]
    return "\n".join([*lines, *_wrapped(plain(option.help))])


def plain(text: str) -> str:
    """A description as a sentence, in one paragraph and without the marks of reStructuredText."""
    words = " ".join(text.replace("``", "`").split())
    sentence = words[:1].upper() + words[1:]
    return sentence if not sentence or sentence.endswith((".", "!", "?", "```")) else f"{sentence}."


def _default_text(value: Any) -> str:
    if inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if not value or "\n" in value or " " in value else value
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)


# ---- sections ----


def sections_of(options: Sequence[Option]) -> dict[str, str]:
    """Options as text, by the group that their names begin with; "" has those without one."""
    listed: dict[str, list[Option]] = {}
    for option in options:
        group, dot, _ = option.name.removeprefix("--").partition(".")
        listed.setdefault(group if dot else "", []).append(option)
    in_order = sorted(listed, key=lambda name: ORDER.index(name) if name in ORDER else 0)
    return {
        name: "\n".join([f"options of {name}:" if name else "options:", *map(render, listed[name]), ""])
        for name in in_order
    }


# ---- classes that an option can name ----


@dataclasses.dataclass(frozen=True)
class Known:
    """The classes of longrl that an option can name."""

    option: str
    classes: Sequence[type]


def known_classes(options: Sequence[Option], files: dict[str, list[str]]) -> list[Known]:
    """For each option that takes a class: those of longrl; and of these again, what they take.

    Args:
        options: of a command.
        files: as `files_by_class` finds them. A base class that none of them names is left out.
    """
    found: list[Known] = []
    seen: set[type] = set()
    in_order = sorted(options, key=lambda option: option.name.startswith("--trainer."))
    waiting = [(option.name, one) for option in in_order for one in option.classes]
    while waiting:
        name, base = waiting.pop(0)
        if base in seen or is_closed(base):
            continue
        seen.add(base)
        classes = [one for one in _subclasses(base) if _can_be_named(one)]
        leaves = [one for one in classes if one.__name__ in files or not set(one.__subclasses__()) & set(classes)]
        if leaves:
            found.append(Known(name, leaves))
        for one in leaves:
            for inner in options_of_class(one):
                inner_name = f"{name}.init_args.{inner.name.removeprefix('--')}"
                waiting += [(inner_name, inner_class) for inner_class in inner.classes]
    return found


def _subclasses(base: type) -> list[type]:
    subclasses: list[type] = base.__subclasses__()
    below = [one for subclass in subclasses for one in _subclasses(subclass)]
    return sorted({base, *below}, key=lambda one: f"{one.__module__}.{one.__qualname__}")


def _can_be_named(one: type) -> bool:
    path = f"{one.__module__}.{one.__qualname__}"
    hidden = inspect.isabstract(one) or getattr(one, "_is_protocol", False) or "._" in path or "<" in path
    hidden |= one.__name__ in ALWAYS_THERE or (dataclasses.is_dataclass(one) and path.startswith("longrl.types."))
    return path.startswith("longrl.") and not path.startswith(OWN_PARTS) and not hidden


def render_classes(known: Sequence[Known], files: dict[str, list[str]]) -> str:
    """The section of the classes, each with its first sentence and the files of `configs/` that name it."""
    lines = ["classes that an option can name:"]
    for item in known:
        lines.append(f"  {item.option}")
        for one in item.classes:
            lines.append(f"    {one.__module__}.{one.__qualname__}")
            lines += _wrapped(first_sentence(one))
            named = files.get(one.__name__, [])
            lines += _wrapped(f"in {', '.join(named)}") if named else []
    return "\n".join([*lines, ""])


def first_sentence(one: Any) -> str:
    """What the docstring of a class or a module begins with."""
    paragraph = " ".join((inspect.getdoc(one) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=(?<!sec)(?<!e\.g)\.) (?=[A-Z`])", paragraph)[0]


@functools.cache
def files_by_class(configs: Path = CONFIGS) -> dict[str, list[str]]:
    """Name of a class -> pieces of `configs/` that name it."""
    found: dict[str, list[str]] = {}
    for path in sorted(configs.glob("*/*.yaml")):
        for name in sorted(set(_class_names(yaml.safe_load(path.read_text(encoding="utf-8"))))):
            found.setdefault(name, []).append(f"{configs.name}/{path.parent.name}/{path.name}")
    return found


def _class_names(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield value["class_path"].rpartition(".")[2]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _class_names(item)
