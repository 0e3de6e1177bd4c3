"""Functions that a config names: `longrl.rewards.accuracy` by import path, or `my_rewards.py:brevity` in a file."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
if TYPE_CHECKING:
    FunctionOrPath = Annotated[Function, "or its path"]
else:

    class FunctionOrPath:
        """The type of a field that a config may fill by a path; `resolve_function` leaves the function there."""

        def __class_getitem__(cls, function: Any) -> Any:
            return str | function


EXAMPLES = "an import path like longrl.rewards.accuracy, or file.py:function"


def import_function(
    path: str, option: str, called_with: Sequence[str] = (), classes: bool = False
) -> Callable[..., Any]:
    """Finds the function at an import path or in a file; relative files lie in the working folder.

    Args:
        path: `package.module.function` or `folder/file.py:function`.
        option: where the path was given, for errors: `data.row_function`.
        called_with: names of what it will be called with, by position; () where that is not known.
        classes: a class will do, for what is called makes something.

    Raises:
        ValueError: there is no such module, file or function, and the message names the nearest ones; or the file
            imports what is not there, or is no Python; or the function takes other arguments.
    """
    location, mark, name = path.rpartition(":" if ":" in path else ".")
    if not location:
        raise ValueError(f"{option} must be {EXAMPLES}, got {path!r}")
    if mark == ":":
        file = Path(location).expanduser().resolve()
        if file.suffix != ".py" or not file.is_file():
            raise ValueError(
                f"{option} {path!r}: there is no Python file {file}; give its path from the working folder"
            )
        try:
            module = _run_file(file)
        except (ImportError, SyntaxError) as error:
            raise ValueError(
                f"{option} {path!r}: {file} does not run ({type(error).__name__}: {error}); correct it, or install "
                "what it imports"
            ) from error
    else:
        module = _import_module(location, path, option)
    if not hasattr(module, name):
        is_wanted = callable if classes else inspect.isfunction
        names = [key for key, value in vars(module).items() if is_wanted(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, names) or names
        raise ValueError(f"{option} {path!r}: {location} has no {name!r}; it has {', '.join(near) or 'no functions'}")
    function: Any = getattr(module, name)
    check_function(function, path, option, classes)
    check_arguments(function, option, called_with)
    return function


def resolve_function(
    function: Function | str, option: str, called_with: Sequence[str] = (), classes: bool = False
) -> Function:
    """The function itself, or the one at a path; arguments and errors are those of `import_function`."""
    resolved: Any = import_function(function, option, classes=classes) if isinstance(function, str) else function
    check_function(resolved, function, option, classes)
    check_arguments(resolved, option, called_with)
    return resolved


def check_function(function: object, given: object, option: str, classes: bool = False) -> None:
    """Raises ValueError for a class in the place of its instance, and for what cannot be called."""
    if inspect.isclass(function) and not classes:
        raise ValueError(
            f"{option} must be a function, got the class {function.__name__}; write it as class_path with init_args, "
            "so that an instance is made"
        )
    if not callable(function):
        raise ValueError(f"{option} must be a function, got {given!r}, a {type(function).__name__}; give {EXAMPLES}")


def check_arguments(function: Callable[..., Any], option: str, called_with: Sequence[str]) -> None:
    """Raises ValueError if a function cannot be called with so many arguments by position."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # written in C: a call will tell
        return
    try:
        if called_with:
            signature.bind(*called_with)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"{option} is called as ({', '.join(called_with)}), but {name} takes {signature} ({error}); give it these "
            "parameters, whatever their names"
        ) from error


def search_working_folder() -> None:
    """Puts the working folder on the search path of imports, where `python -m longrl` has it already."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import_module(location: str, path: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        if error.name and (location == error.name or location.startswith(error.name + ".")):
            raise ValueError(
                f"{option} {path!r}: there is no module {error.name!r}; give {EXAMPLES}, from the working folder"
            ) from error
        raise  # a module that the user's own imports


@functools.cache
def _run_file(file: Path) -> ModuleType:
    name = "longrl_user_" + re.sub(r"\W", "_", str(file))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, f"{file} ends in .py"
    assert spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it runs
    spec.loader.exec_module(module)
    return module
