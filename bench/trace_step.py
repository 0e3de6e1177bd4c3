"""What one RL step of the demo calls: how many functions, in how many files, and how often a reader changes files.

    python bench/trace_step.py --json FILE [--list] [OVERRIDES...]

One GRPO step of configs/demo through the command line, on generated videos, two prompts with eight completions each,
from the shipped base model; with the KL penalty, so that the reference policy is part of it. OVERRIDES are further
options of `fit`. Three phases are traced, in the main thread:

- `loader`: everything that the train loader calls to hand out a batch, from mp4 to `Batch`;
- `on_train_batch_start` of the `RolloutCallback`: encode, generate, reward;
- `training_step` of the `PolicyModule`: reference and update.

What is counted, of code that lies in `longrl/`:

- A function is a name in a file: methods of the same name in one file are one, and so are all its lambdas.
  Comprehensions, generator expressions, class and module bodies and generated methods are none.
- `file_changes`: of the functions of a phase in the order of their first calls, how often one lies in another file than
  the one before; the first counts.
- `deepest`: frames of ours between the phase's first one and the deepest call of a function, that one included;
  comprehensions count here, as in a traceback.
- Over all phases `functions` and `files` are distinct ones, `file_changes` a sum and `deepest` the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from common import ROOT, console, print_table, provenance, write_json
from lightning.pytorch import Trainer

import longrl
from longrl.callbacks.rollout import RolloutCallback
from longrl.commands.main import main as longrl_main
from longrl.modules.policy import PolicyModule

CONFIGS = ("configs/demo/common.yaml", "configs/demo/grpo.yaml")
NO_FUNCTIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>")


# ---- recording ----


@dataclass(frozen=True)
class Function:
    """One that was called; the same as another with its file and name."""

    file: str
    name: str
    qualname: str = field(compare=False)
    line: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.qualname.replace('<locals>.', '')}:{self.line}"


@dataclass
class Trail:
    """What a phase called."""

    functions: dict[Function, None] = field(default_factory=dict)
    """In the order of first calls."""
    deepest: int = 0


class Recorder:
    """Records calls of functions whose code lies in the folder `package`, phase by phase."""

    def __init__(self, package: Path) -> None:
        self.prefix = f"{package}/"
        self.phases: dict[str, Trail] = {}

    def run(self, phase: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call; what it calls belongs to `phase`."""
        path, base = self.phases.setdefault(phase, Trail()), sys._getframe()

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and self._is_function(frame):
                code = frame.f_code
                file = code.co_filename.removeprefix(self.prefix)
                path.functions.setdefault(Function(file, code.co_name, code.co_qualname, code.co_firstlineno))
                path.deepest = max(path.deepest, self._depth(frame, base))

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(before)

    def hook(self, owner: type, name: str) -> contextlib.AbstractContextManager[Any]:
        """Makes a method the phase of its name."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            return self.run(name, method, *args, **kwargs)

        return mock.patch.object(owner, name, recorded)

    def iterate(self, phase: str, make: Callable[[Any], Iterator[Any]], loader: Any) -> Iterator[Any]:
        """What an iterator yields; only its own work belongs to `phase`, not what is done with its items."""
        items = self.run(phase, make, loader)
        while True:
            try:
                item = self.run(phase, next, items)
            except StopIteration:
                return
            yield item

    def _is_function(self, frame: FrameType) -> bool:
        code = frame.f_code
        is_body = not code.co_flags & inspect.CO_OPTIMIZED  # of a module or class
        return code.co_filename.startswith(self.prefix) and not is_body and code.co_name not in NO_FUNCTIONS

    def _depth(self, frame: FrameType | None, base: FrameType) -> int:
        """Frames of ours above the phase's first."""
        depth = -1
        while frame is not None and frame is not base:
            depth += frame.f_code.co_filename.startswith(self.prefix)
            frame = frame.f_back
        return depth


# ---- counting ----


def file_changes(functions: Sequence[Function]) -> int:
    """Files that a reader opens one after the other."""
    return sum(1 for _ in itertools.groupby(functions, lambda function: function.file))


def summary(phases: Mapping[str, Trail]) -> dict[str, Any]:
    """The fields of the JSON."""
    of_phases = {
        name: {
            "functions": len(path.functions),
            "files": len({function.file for function in path.functions}),
            "file_changes": file_changes([*path.functions]),
            "deepest": path.deepest,
        }
        for name, path in phases.items()
    }
    every = {function for path in phases.values() for function in path.functions}
    return {
        "functions": len(every),
        "files": len({function.file for function in every}),
        "file_changes": sum(found["file_changes"] for found in of_phases.values()),
        "deepest": max(found["deepest"] for found in of_phases.values()),
        "phases": {
            name: {**found, "path": [str(function) for function in phases[name].functions]}
            for name, found in of_phases.items()
        },
    }


def readable(phases: Mapping[str, Trail]) -> Iterator[str]:
    """A line per stay in a file, so that a phase has as many lines as file changes."""
    for name, path in phases.items():
        yield f"\n{name}"
        for file, group in itertools.groupby(path.functions, lambda function: function.file):
            names = (str(function).partition(":")[2] for function in group)
            yield f"  {file}  {', '.join(names)}"


# ---- the step ----


def trace(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Trail]:
    """Runs the step with what it needs in `folder`."""
    recorder = Recorder(Path(longrl.__file__).parent)
    data = folder / "data"
    longrl_main(["synthetic", f"--out={data}", "--num_train_videos=2", "--num_eval_videos=0", "--workers=1"])
    options = [
        "--model.init_from=null", "--model.algorithm.kl_coef=0.04", "--trainer.max_steps=1", "--data.num_workers=0",
        "--data.prompts_per_batch=2", "--data.blind_share=0", "--data.test=null",
        f"--data.train={data / 'train.jsonl'}",
    ]  # fmt: skip
    configs = [f"--config={config}" for config in CONFIGS]
    with (
        contextlib.chdir(ROOT),
        recorder.hook(RolloutCallback, "on_train_batch_start"),
        recorder.hook(PolicyModule, "training_step"),
        recorded_loader(recorder),
    ):
        longrl_main(["fit", *configs, f"--run_dir={folder / 'run'}", *options, *overrides])
    return {name: recorder.phases[name] for name in ("loader", "on_train_batch_start", "training_step")}


def recorded_loader(recorder: Recorder) -> contextlib.AbstractContextManager[Any]:
    """Makes iterating over the train loader of `Trainer.fit` the phase `loader`."""
    fit = Trainer.fit

    @functools.wraps(fit)
    def recorded_fit(self: Trainer, *args: Any, datamodule: Any, **kwargs: Any) -> None:
        train_dataloader = datamodule.train_dataloader

        def recorded_train_dataloader() -> Any:
            loader = train_dataloader()
            kind = type(loader)
            methods = {"__iter__": lambda self: recorder.iterate("loader", kind.__iter__, self)}
            loader.__class__ = type(kind.__name__, (kind,), methods)
            return loader

        datamodule.train_dataloader = recorded_train_dataloader
        fit(self, *args, datamodule=datamodule, **kwargs)

    return mock.patch.object(Trainer, "fit", recorded_fit)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers and the path")
    parser.add_argument("--list", action="store_true", help="print the path")
    parser.add_argument("--quick", action="store_true", help="changes nothing: one step takes seconds")
    arguments, overrides = parser.parse_known_args(argv)
    if Path(longrl.__file__).resolve().parent != ROOT / "longrl":
        parser.error("imported longrl is that of another checkout; set PYTHONPATH to the one to trace")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        phases = trace(Path(folder), overrides)
    result = summary(phases)
    numbers = ("functions", "files", "file_changes", "deepest")
    rows = [{"phase": name} | {key: values[key] for key in numbers} for name, values in result["phases"].items()]
    print_table(Path(__file__).stem, [*rows, {"phase": "all"} | {key: result[key] for key in numbers}])
    if arguments.list:
        for line in readable(phases):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if arguments.json:
        origin = provenance("trace_step", arguments)
        write_json(
            arguments.json, {**origin, "command": " ".join([origin["command"], *overrides]), "rows": rows, **result}
        )


if __name__ == "__main__":
    main()
