"""Lets torchvision be imported beside a CPU build of PyTorch.

The torchvision wheels of the package index are CUDA builds. Beside a CPU PyTorch their library does not load, so the
operators `nms` and `qnms` do not exist, and `import torchvision` stops where it registers fake versions of them. Then
`import lightning` stops too, for torchmetrics imports torchvision where it is installed. Resizing, normalising and
transformers' image and video processors are plain Python and need neither operator; declaring the two names is enough
for them. Calling them stays an error.

They are declared only once an import has failed for want of them: a library that does load defines them itself, and a
second definition ends the process. Beside a PyTorch that is no CPU build nothing is hooked at all.

`import longrl` calls `retry_on_import`. `make env` also copies this file, which imports nothing of longrl, into its
environment and has every Python there call it, for processes that load torchvision before longrl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

SYMPTOM = "operator torchvision::nms does not exist"


def retry_on_import() -> None:
    """Has a first import of torchvision that fails for its operators tried again with their names declared."""
    known = "torchvision" in sys.modules or any(type(finder).__name__ == "_OperatorFinder" for finder in sys.meta_path)
    if not known and _torch_is_cpu_build():
        sys.meta_path.insert(0, _OperatorFinder())


def _torch_is_cpu_build() -> bool:
    """Whether the installed PyTorch says that it is one; nothing is imported."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


class _OperatorFinder(MetaPathFinder):
    """Finds torchvision as Python would, but has it loaded by `_RetryingLoader`; knows no other module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _RetryingLoader(spec.loader.name, spec.loader.path)
        return spec


class _RetryingLoader(SourceFileLoader):
    """Runs torchvision's code, and once more with the names declared if that fails for want of them."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if SYMPTOM not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # half imported
            _declare_operators()
            super().exec_module(module)


def _declare_operators() -> None:
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):  # another package may have declared one
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
