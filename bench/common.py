"""What all benchmarks share: arguments, a fresh process, where they ran, table and JSON."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table

import longrl
from longrl.io.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[1]
Row = Mapping[str, int | float | str]
Result = TypeVar("Result")
console = Console()
if not console.is_terminal:  # rich would squeeze the table into 80 columns
    console = Console(width=160)


def parse_arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """`json` (a path or None) and `quick` (a bool) of a benchmark's command line; `argv` None takes sys.argv."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, with command and hardware")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute on 2 cores")
    return parser.parse_args(argv)


def report(
    script: str,
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    more: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Prints the rows as a table with the notes below it and, if asked for, writes the JSON.

    Args:
        script: `__file__` of the benchmark.
        arguments: from `parse_arguments`.
        rows: all with the same fields.
        notes: what the table leaves out.
        more: further tables by name; in the JSON beside `rows`.
    """
    name = Path(script).stem
    print_table(name, rows)
    for title, others in (more or {}).items():
        print_table(title, others)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    if arguments.json:
        write_json(arguments.json, {**provenance(name, arguments), "rows": list(rows), **(more or {})})
        console.print(f"written to {arguments.json}", soft_wrap=True)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that have all the same fields."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def provenance(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What it takes to repeat a run: `command`, `commit`, `hardware` and `versions`; no host names, no paths."""
    command = ["python", f"bench/{name}.py"]
    command += ["--json", _shown(arguments.json)] if arguments.json else []
    command += ["--quick"] if arguments.quick else []
    return {
        "command": " ".join(command),
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
        "versions": {
            "python": platform.python_version(),
            # Of the modules, not of what is installed: longrl may be there by PYTHONPATH alone.
            **{module.__name__: str(module.__version__) for module in (longrl, torch, transformers)},
        },
    }


def import_path() -> str:
    """PYTHONPATH of a process that is to find longrl, installed or not, and what a benchmark's config names."""
    return os.pathsep.join(filter(None, [str(ROOT / "bench"), str(ROOT), os.environ.get("PYTHONPATH")]))


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls `function` in a new interpreter, whose memory nothing else has touched.

    There glibc gives every larger block back as soon as it is freed; else holes in the heap would add to the peak of a
    process, more with every pass.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(1 << 16)):
            started = pool.submit(function, *arguments)
        return started.result()


def peak_memory_mib() -> float:
    """The most physical memory this process has held so far."""
    try:  # Linux; its ru_maxrss would start at the parent's peak
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except FileNotFoundError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def _shown(path: Path) -> str:
    """The path as seen from the repository; of a file elsewhere only its name."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _commit() -> str | None:
    """The commit checked out, `+changes` behind it if tracked files differ from it; None outside a repository."""
    try:
        head, status = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if status else head


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")
