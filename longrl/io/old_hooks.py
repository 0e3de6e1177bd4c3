"""Hooks under the names of an earlier release: refused in a class of one's own, for nothing would ever call them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, ClassVar

import yaml

OLD_HOOKS: dict[str, dict[str, str]] = yaml.safe_load(files(__package__).joinpath("old_hooks.yaml").read_text())
"""Kind of class -> old name of a hook -> what is written instead."""


class RefusesOldHooks:
    """A base class whose subclasses may not define hooks by names of `_old_hooks`, one kind of `OLD_HOOKS`."""

    _old_hooks: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, new in cls._old_hooks.items():
            if name in vars(cls):
                raise ValueError(
                    f"{cls.__qualname__} defines {name}, a hook of longrl 0.1.0 that nothing calls any more; write "
                    f"{new} instead (arguments may differ, see its default)"
                )
