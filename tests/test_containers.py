"""Dockerfile and .dockerignore against the locks, pyproject.toml and the tree: nothing is built."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
PYTHONS = {"ubuntu24.04": "3.12", "ubuntu22.04": "3.10", "bookworm-slim": "3.11", "trixie-slim": "3.13"}
"""Python of each system's own packages."""


def instructions():
    """(word, what follows it) of every instruction, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(word):
    return [rest for name, rest in instructions() if name == word]


def lock(name):
    return (ROOT / "requirements" / name).read_text()


def test_what_is_copied_is_there_and_not_ignored():
    sources = [word for rest in of("COPY") for word in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in IGNORED), source


def test_what_the_package_needs_is_not_ignored():
    for name in ("pyproject.toml", "README.md", "LICENSE", "longrl", "configs", "launch", "longvideo-reason"):
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED), name


def test_each_device_has_a_stage_with_a_lock_and_a_python_that_longrl_allows():
    allowed = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    stages = dict(reversed(rest.split(" AS ")) for rest in of("FROM"))
    assert set(stages) == {"system-cpu", "system-cuda", "longrl"}
    assert stages["longrl"] == "system-${DEVICE}"
    for name in ("system-cpu", "system-cuda"):
        system = stages[name].rpartition(":")[2].rpartition("-devel-")[2]
        assert PYTHONS[system] in allowed, stages[name]
    assert set(re.findall(r"LOCK=(\S+)", TEXT)) == {"cpu.lock", "gpu.lock"}


def test_the_cuda_image_is_of_the_cuda_that_the_pinned_torch_is_built_for():
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", lock("gpu.lock"), re.MULTILINE)
    (image,) = re.findall(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel", TEXT)
    (driver,) = re.findall(r"driver of version (\d+)", lock("gpu.lock"))
    assert image == cuda
    assert f"NVIDIA driver of version {driver} or newer" in TEXT
    (torch,) = re.findall(r"^torch==(\d+\.\d+)", lock("gpu.lock"), re.MULTILINE)
    assert f"Python {PYTHONS['ubuntu24.04']}, torch {torch} and CUDA {cuda.partition('.')[0]}" in TEXT


def test_base_images_are_pinned():
    for rest in of("FROM")[:2]:
        tag = rest.partition(" AS ")[0].rpartition(":")[2]
        assert tag not in ("", "latest", rest)


@pytest.mark.parametrize("command", of("RUN"))
def test_the_shell_takes_every_command(command):
    without_mounts = re.sub(r"--mount=\S+", "", command)
    result = subprocess.run(["bash", "-n", "-c", without_mounts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_container_runs_as_a_user_and_says_what_it_can_do():
    assert of("USER")[-1] == "longrl"
    assert of("ENTRYPOINT") == ['["python", "-m", "longrl"]']
    assert of("CMD") == ['["doctor"]']


def test_the_options_that_the_guide_names_are_there():
    guide = (ROOT / "docs" / "install.md").read_text()
    named = set(re.findall(r"--build-arg (\w+)=", guide + TEXT))
    assert {"DEVICE", "FLASH_ATTN", "UID"} <= named
    assert named <= {rest.partition("=")[0] for rest in of("ARG")}
