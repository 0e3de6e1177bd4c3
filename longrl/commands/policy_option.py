"""Which kind of policy a command line asks for. Read before there is a parser: it decides what that is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Policy = Literal["causal", "flow"]
"""What a run trains: a model that writes, or one that draws pictures and videos."""


def policy_of(args: Sequence[str]) -> Policy:
    """The option `policy` of a command line, or of the config files that it names; the last one that says counts.

    Raises:
        ValueError: it is no kind of policy, or a config is no YAML.
    """
    found = "causal"
    for name, value in options_of(args):
        if name == "--policy":
            found = value
        elif name in ("--config", "-c") and Path(value).is_file():
            found = _in_file(value, found)
    if found not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, got {found!r}")
    return found  # type: ignore[return-value]  # just compared


def refuse_flow(command: str, args: Sequence[str]) -> None:
    """Raises ValueError if `args` describe a policy that draws, for a command that knows none."""
    if policy_of(args) == "flow":
        raise ValueError(
            f"`{command}` knows no policies that draw, got a config with `policy: flow`; fit, validate, test, export "
            "and report take it"
        )


def refuse_training(command: str, args: Sequence[str], remedy: str) -> None:
    """Raises ValueError if `args` name a config of a training run, for a command that reads none."""
    for name, value in options_of(args):
        if name == "--config" and Path(value).is_file():
            for key in sorted({"trainer", "model"} & _values(value).keys())[:1]:
                raise ValueError(
                    f"--config {value} is of a training run (it has `{key}`), which `{command}` does not read; {remedy}"
                )


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of every `--name=value` and `--name value`."""
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if equals:
            yield name, value
        elif index + 1 < len(args):
            yield name, args[index + 1]


def _in_file(path: str, otherwise: str) -> str:
    return str(_values(path).get("policy", otherwise))


def _values(path: str) -> dict[str, Any]:
    """The mapping in a config; empty for anything else."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}
