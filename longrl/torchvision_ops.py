"""Lets torchvision be imported beside a PyTorch its compiled operators do not fit.

The torchvision wheels of the package index are CUDA builds. Beside a CPU PyTorch their library `_C` does not load, so
the operators `nms` and `qnms` do not exist, and `import torchvision` stops where it registers fake versions of them:
"operator torchvision::nms does not exist". `import lightning` then stops too, for torchmetrics imports torchvision
where it is installed. Resizing, normalising and transformers' image and video processors are plain Python and need
neither operator; declaring the two names is enough for them. Calling them stays an error.

This module imports nothing heavy, because `make env` has every Python start of its environment call
`declare_on_import`, the processes that tests, loaders and vLLM spawn included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[torch.library.Library] = []
"""Kept, since PyTorch forgets operators whose library object is collected."""


def declare_on_import() -> None:
    """Has `declare_missing_ops` run whenever torchvision comes to be imported in this process; free until then."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def declare_missing_ops() -> bool:
    """Declares the operators torchvision's import needs, if its own do not load; call it before that import.

    Harmless to call again, after torchvision was imported, or where torchvision is not installed.

    Returns:
        True if this call declared them.
    """
    return "torchvision" not in sys.modules and _declare()


def _declare() -> bool:
    import torch

    if _own_ops_load():
        return False
    missing = [schema for schema in _SCHEMAS if not hasattr(torch.ops.torchvision, schema.split("(")[0])]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)
    return bool(missing)


def _own_ops_load() -> bool:
    """Tries to load torchvision's `_C` as torchvision itself will; True also if torchvision is not installed."""
    import torch

    package = find_spec("torchvision")  # a top-level name: nothing is imported
    if package is None:
        return True
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:  # torchvision built without operators
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


class _Finder(MetaPathFinder):
    """Finds torchvision as Python would, but has it loaded by `_Loader`; knows no other module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Declares the missing operators just before torchvision's code runs; looking for torchvision costs nothing."""

    def exec_module(self, module: ModuleType) -> None:
        _declare()
        super().exec_module(module)
