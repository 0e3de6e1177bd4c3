"""The machine as its system describes it: driver, processors, memory, disk, limits, variables. Imports no torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from longrl.commands.doctor_findings import Finding, State, guarded
from longrl.io.disk_space import GIB, free_bytes
from longrl.io.secrets import MASK, NAMES, mask_secrets

SECTION = "machine"
VARIABLES = re.compile(
    r"(CUDA|NVIDIA|NCCL|GLOO|HF|HUGGINGFACE|TRANSFORMERS|LONGRL|OMP|WANDB|VLLM|SLURM_JOB|PYTORCH|TORCH|TRITON|FLASH)_"
    r"|TOKENIZERS_PARALLELISM$|LD_LIBRARY_PATH$|MASTER_(ADDR|PORT)$|(LOCAL_|NODE_)?RANK$|WORLD_SIZE$"
)
"""Names of variables that change what a run does."""
PASSWORD = re.compile(r"//[^/@\s]*@")
"""User and password of an address, as of a mirror of the hub or a proxy."""
LEAST_SHARED_GIB = 1
"""Docker gives a container 0.06; loader workers hand a prompt of an hour of video over in several GiB."""
LEAST_DISK_GIB = 10
LEAST_OPEN_FILES = 1024


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded; also within a container. None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def check_machine() -> Iterator[Finding]:
    """Processors, memory, shared memory, disk, open files, compilers."""
    yield Finding(SECTION, "system", f"{platform.platform()}, {platform.machine()}")
    checks: dict[str, Callable[[], Finding]] = {
        "CPU cores": lambda: Finding(SECTION, "CPU cores", _cores()),
        "memory": lambda: Finding(SECTION, "memory", _memory()),
        "shared memory": lambda: _shared_memory(Path("/dev/shm")),
        "disk": lambda: _disk(Path.cwd()),
        "open files": _open_files,
        "C++ compiler": _compiler,
    }
    for name, check in checks.items():
        yield from guarded(SECTION, name, lambda check=check: [check()])  # type: ignore[misc]


def check_variables() -> Iterator[Finding]:
    """The variables of the environment that change what a run does; keys are masked."""
    for name in sorted(filter(VARIABLES.match, os.environ)):
        value = MASK if NAMES.search(name) else PASSWORD.sub(f"//{MASK}@", mask_secrets(os.environ[name]))
        yield Finding("variables", name, value)


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _control_group("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return f"{usable}, limited to {int(quota[0]) / int(quota[1]):g}"
    return str(usable)


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB free"
    limit = _control_group("memory.max")
    if limit.isdigit() and int(limit) < memory.total:
        text += f"; limited to {int(limit) / GIB:.0f} GiB"
    return text


def _control_group(name: str) -> str:
    """A limit that a container or batch system has set; empty without one."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding(SECTION, "shared memory", "no /dev/shm on this system")
    usage = shutil.disk_usage(folder)
    value = f"{folder}: {usage.total / GIB:.2g} GiB, {usage.free / GIB:.2g} GiB free"
    if usage.total >= LEAST_SHARED_GIB * GIB:
        return Finding(SECTION, "shared memory", value)
    remedy = "docker run --shm-size=16g (or --ipc=host), or data.num_workers=0, which needs none"
    return Finding(SECTION, "shared memory", value, "warning", remedy)


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder) / GIB
    value = f"{free:.0f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(SECTION, "disk", f"{folder} cannot be written", "warning", "name another folder by --run_dir")
    if free < LEAST_DISK_GIB:
        return Finding(SECTION, "disk", value, "warning", "name a --run_dir on another disk")
    return Finding(SECTION, "disk", value)


def _open_files() -> Finding:
    if platform.system() == "Windows":
        return Finding(SECTION, "open files", "no limit is known")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"at most {soft} (ulimit -n; may be raised to {hard})"
    state: State = "ok" if soft == resource.RLIM_INFINITY or soft >= LEAST_OPEN_FILES else "warning"
    return Finding(SECTION, "open files", value, state, "" if state == "ok" else "ulimit -n 65536")


def _compiler() -> Finding:
    """For Triton and torch.compile, where a run asks for them."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        return Finding(SECTION, "C++ compiler", found)
    value = "none: Triton's kernels and model.family.init_args.compile_layers need one"
    return Finding(SECTION, "C++ compiler", value, "missing", "apt-get install g++")
