"""Parsers of jsonargparse whose errors are one line: which option, what it may be, and in which line of which file."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from longrl.commands.aliases import alias_command, aliases_of
from longrl.commands.failures import MAX_CHARACTERS, find_mistake
from longrl.io.exit_codes import MISTAKE
from longrl.io.one_line import one_line
from longrl.io.shipped_files import YAML, find_recipe
from longrl.io.text_files import read_utf8


def distrust_values() -> None:
    """Has parsers read no config from an address, and make no object where any value may stand.

    What comes from a stranger could fetch more, and run it. Lightning allows addresses when its parser is imported.
    """
    set_parsing_settings(config_read_mode_fsspec_enabled=False, instantiate_subclass_spec_in_any=False)


distrust_values()


@contextlib.contextmanager
def described_fields() -> Iterator[None]:
    """Has parsers that are made meanwhile describe fields of dataclasses; it takes longer, and only help needs it."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        yield
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


UNKNOWN = re.compile(
    r"(?:Option|option) '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: ([^\s=]+)"
)
"""How jsonargparse says that there is no such option."""
KEY = re.compile(r'Parser key "([^"]+)"|^Group \'([^\']+)\' does not')
CLASS = re.compile(r"class_path '([\w.]+)'")
NO_FILE = re.compile(r'Unable to load config "([^"]+)"')
WHOLE_GROUPS = {
    "model": "weights are named by --weights, a family of models by --family configs/family/NAME.yaml",
    "data": "rows are named by --train, --val and --test, a data set's options by --config configs/data/NAME.yaml",
    "rollout": "name a reward by --reward, an engine by --engine",
    "trainer": "such as configs/trainer/gpu.yaml",
}
"""Groups of options that users take for one, and what they mean."""
FILLER = (
    "Does not validate against any", "- Does not validate against any", "Subtypes:", "Errors:", "Given value",
    "- Expected a <class 'NoneType'>", "Parser key", "Problem with given class_path", "- Problem with given class_path",
    "- Expected a path but {",
)  # fmt: skip
"""How lines begin that say nothing of what is wrong."""
PASSED_OVER = ("init_args", "dict_kwargs")
"""Keys of a config that stand between an option and its group."""
MAX_DEPTH = 40
NO_ALIASES: Mapping[str, str] = {}
PROG = "python -m longrl"


class ShortErrors(ArgumentParser):
    """A parser that ends the command with one line."""

    given: Sequence[str] = ()
    """The command line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if "prog" not in options:  # jsonargparse makes such a one for `--OPTION.help CLASS`
            options |= {"prog": PROG, "usage": f"{PROG} COMMAND --config FILE.yaml [--KEY VALUE ...]"}
        super().__init__(*args, **options)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:  # type: ignore[override]
        """As that of jsonargparse."""
        self.given = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_args(args, *more, **options)
        except UnicodeDecodeError as error:
            _tell_encoding(self.given)
            raise ValueError(f"a file that a config names is no UTF-8: {error}; save it anew") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong and ends the process with status 2; within another parser it raises."""
        if not self.exit_on_error:
            super().error(message, ex)
        found = find_mistake(ex)
        aliases = aliases_of(self._command())
        text = str(found) if found is not None else explain(message, self.given, self._option_names(), aliases)
        if UNKNOWN.search(message) is None and "required" in message:
            text = f"{text}; {' '.join(self.format_usage().split())}"
        sys.stderr.write(f"longrl: error: {one_line(text, MAX_CHARACTERS)}\n")
        sys.exit(MISTAKE)

    def _command(self) -> str:
        """The command that is parsed, as `ALIASES` names it; a subcommand's `prog` ends with it, behind a usage."""
        words = self.prog.split()[len(PROG.split()) :]
        group = [word for word in words[:1] if word == "diffusion"]
        return alias_command([*group, *(words[len(group) :][-1:] or self.given)])

    def _option_names(self) -> list[str]:
        """Dotted names of the options, of the subcommand's where there is one."""
        parsers = [self, *subparsers(self, self.given)]
        return [flag[2:] for parser in parsers for action in parser._actions for flag in action.option_strings]


def explain(message: str, given: Sequence[str], options: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> str:
    """An error of jsonargparse in one line.

    Args:
        message: its own, of one line or many.
        given: the command line.
        options: dotted names of those that there are.
        aliases: short names of the command.
    """
    group = ".".join(key or of_group for key, of_group in KEY.findall(message))
    no_file = NO_FILE.search(message)
    if no_file is not None and set(group.split(".")) == {group.partition(".")[0]}:  # jsonargparse says it twice
        group = group.partition(".")[0]
    if no_file is not None and group in WHOLE_GROUPS:
        return f"{group} takes a YAML file with options, and {no_file[1]!r} is none; {WHOLE_GROUPS[group]}"
    unknown = [next(filter(None, match.groups())).removeprefix("--") for match in UNKNOWN.finditer(message)]
    if not unknown:
        lines = [line.strip() for line in message.splitlines()]
        said = [line.removeprefix("- ") for line in lines if not line.startswith(FILLER)]
        text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(said)) or message
        return _located(group, given, f"{group}: {text}" if group else text)
    class_paths = CLASS.findall(message)
    key = unknown[-1]
    if class_paths:  # of `pass_rate.low` the class lacks the first name; it was asked for no other
        key = key.partition(".")[0]
    name = ".".join(filter(None, [group, key]))
    options = list(options)
    remedy = foreign_remedy(name, options, aliases)
    if not remedy and "." not in name and not class_paths:
        remedy = _near_remedy(name, options, aliases)
    if not remedy:
        nearest = _nearest(name, class_paths, options, aliases)
        remedy = f"did you mean {nearest}?" if nearest else "--help lists all that there are"
    return _located(name, given, f"there is no option {name}; {remedy}")


def foreign_remedy(name: str, options: Sequence[str], aliases: Mapping[str, str]) -> str:
    """What an option of another trainer or evaluator is called here; "" of a name that none has.

    Args:
        name: of the option, with its groups.
        options: dotted names of those that there are.
        aliases: short names of the command.
    """
    if name.endswith(YAML) or find_recipe(name) is not None:
        return f"a config file stands behind --config: --config {name}"
    known = foreign_names()
    entry = known.get(name) or known.get(name.rpartition(".")[2])
    if entry is None:
        is_verl = name.startswith("actor_rollout_ref.")
        return "docs/command_line.md says what verl's options are called here" if is_verl else ""
    entry = entry if isinstance(entry, dict) else {"option": entry}
    named = entry.get("option", [])
    candidates = [named] if isinstance(named, str) else named
    option = next((one for one in candidates if _leads_to(one, options)), None)
    note = entry.get("note", "")
    if not candidates:
        return note
    if option is None:  # of another command
        return ""
    return _meant(option, {} if "." in name else aliases, note)


def _meant(option: str, aliases: Mapping[str, str], note: str = "") -> str:
    """The question whether an option was meant, with its short name where that is shorter."""
    short = next((short for short, long in aliases.items() if long == option and len(short) < len(long)), "")
    remarks = ", ".join(filter(None, [short and f"short: --{short}", note]))
    return f"did you mean {option} ({remarks})?" if remarks else f"did you mean {option}?"


def _near_remedy(name: str, options: Sequence[str], aliases: Mapping[str, str]) -> str:
    """What a name without groups is meant for: a short name, the end of an option's, one of another tool; or ""."""
    known = {foreign: foreign_remedy(foreign, options, aliases) for foreign in foreign_names()}
    ends = {option.rpartition(".")[2]: option for option in (*options, *aliases.values()) if option}
    ends |= {option: option for option in options if option and "." not in option}
    known |= {meant: _meant(option, aliases) for meant, option in (ends | dict(aliases)).items()}
    near = difflib.get_close_matches(name, [meant for meant, remedy in known.items() if remedy], n=1, cutoff=0.65)
    return known[near[0]] if near else ""


def _leads_to(option: str, options: Sequence[str]) -> bool:
    """Whether a command has an option, or the class or settings whose option it is."""
    group = option.partition(".init_args")[0]
    parent = group.rpartition(".")[0]
    return group in options or ("." in parent and parent in options)


@functools.cache
def foreign_names() -> dict[str, Any]:
    """The table of what other tools call options."""
    return yaml.safe_load(files(__package__).joinpath("foreign_names.yaml").read_text(encoding="utf-8"))


def _nearest(name: str, class_paths: Sequence[str], options: Iterable[str], aliases: Mapping[str, str]) -> str:
    """The option that a name is most like: of the innermost class that the error names, else of the parser."""
    group, _, last = name.rpartition(".")
    known = [f"{group}.{option}" for option in _parameters(class_paths[-1])] if class_paths else [*options]
    siblings = {option.rpartition(".")[2]: option for option in known if option.rpartition(".")[0] == group}
    near = difflib.get_close_matches(last, siblings, n=1)
    if near:
        return siblings[near[0]]
    groups = [] if group in known else difflib.get_close_matches(group, known, n=1, cutoff=0.75)
    if groups and "." in group:  # what a class takes is not among the parser's options
        return f"{groups[0]}.{last}"
    ending = [option for option in (*known, *aliases.values()) if option.endswith(f".{last}")]
    if ending and not class_paths:  # in another group
        return ending[0]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), "")


def _parameters(class_path: str) -> list[str]:
    """Names of what a class that is already imported takes."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return list(inspect.signature(found).parameters) if inspect.isclass(found) else []


def _located(name: str, given: Sequence[str], text: str) -> str:
    """A text with the file and line in front of it that an option stands in, if it is not on the command line."""
    if not name:
        return text
    for arg, following in reversed(list(zip(given, [*given, ""][1:], strict=True))):
        option, equals, value = arg.partition("=")
        path = Path(value if equals else following)
        if option == f"--{name}" or (name.startswith(f"{option[2:]}.") and not _is_file(path)):
            return text
        if option in ("--config", "-c") and path.is_file():
            line = find_line(path.read_text(encoding="utf-8", errors="replace"), name)
            if line is not None:
                return f"{path}, line {line}: {text}"
    return text


def _is_file(path: Path) -> bool:
    """Whether a value of the command line names a file; one that is longer than a name may be does not."""
    try:
        return path.is_file()
    except OSError:
        return False


def _tell_encoding(given: Sequence[str]) -> None:
    """Raises ValueError for the first config of a command line that is no UTF-8."""
    for arg, following in zip(given, [*given, ""][1:], strict=True):
        path = Path(arg.partition("=")[2] or following)
        if arg.startswith("-") and path.is_file():
            read_utf8(path)


def find_line(text: str, name: str) -> int | None:
    """The line of a YAML text, from 1, that a dotted key stands in; None if it has no such key."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    return next(_lines_of(root, name.split("."), MAX_DEPTH), None)


def _lines_of(node: yaml.Node | None, path: list[str], depth: int) -> Iterator[int]:
    """Lines of the keys that a path leads to, through lists and `init_args`."""
    if depth == 0:  # anchors can make circles
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _lines_of(item, path, depth - 1)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == path[0] and len(path) == 1:
            yield key.start_mark.line + 1
        elif key.value == path[0]:
            yield from _lines_of(value, path[1:], depth - 1)
        elif key.value in PASSED_OVER:
            yield from _lines_of(value, path, depth - 1)


def subparsers(parser: Any, given: Sequence[str]) -> Iterator[Any]:
    """The parser of the subcommand that a command line begins with."""
    for action in parser._actions:
        choices = action.choices
        if hasattr(choices, "keys") and given[:1] and given[0] in choices:
            yield choices[given[0]]
