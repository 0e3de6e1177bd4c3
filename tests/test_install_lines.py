"""README's install lines, extras that messages name, and lock files, against pyproject.toml; no network is asked."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEED_TORCH_TO_BUILD = {"apex", "causal-conv1d", "flash-attn", "mamba-ssm", "transformer-engine-torch"}
"""Released as source whose build imports torch: pip builds in an environment that has none, and fails."""
BOUNDED = {
    *("bitsandbytes", "diffusers", "jsonargparse", "lightning", "peft", "torch", "torchvision", "transformers", "vllm"),
}


@pytest.fixture
def check_install(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "requirements")
    return importlib.import_module("check_install")


def all_requirements():
    return [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]


def test_install_lines_name_extras_that_there_are(check_install):
    lines = check_install.install_lines((ROOT / "README.md").read_text())
    assert "-e ." in lines
    for line in lines:
        check_install.requirements_of(line, PROJECT)


def test_no_extra_pulls_what_needs_torch_to_build():
    assert NEED_TORCH_TO_BUILD.isdisjoint(requirement.name for requirement in all_requirements())


def test_what_builds_against_torch_is_installed_afterwards(check_install):
    lines = check_install.install_lines((ROOT / "README.md").read_text())
    late = [line for line in lines if any(name in line for name in NEED_TORCH_TO_BUILD)]
    assert late
    assert all(check_install.AFTERWARDS in line for line in late)
    assert lines.index(late[0]) > lines.index("-e .")


def test_extras_that_code_and_documents_name_are_there():
    files = [*(ROOT / "longrl").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        (file.name, extra)
        for file in files
        for extras in re.findall(r"(?:longrl|[ '\"]\.)\[([a-z][\w,-]*)\]", file.read_text())
        for extra in extras.split(",")
    }
    assert ("README.md", "vllm") in named
    assert sorted((file, extra) for file, extra in named if extra not in EXTRAS) == []


def test_libraries_whose_inner_parts_are_called_are_bounded_above():
    loose = {
        requirement.name
        for requirement in all_requirements()
        if requirement.name in BOUNDED and not any(bound.operator in ("<", "==") for bound in requirement.specifier)
    }
    assert loose == set()


@pytest.mark.parametrize("lock", ["gpu.lock", "newest.lock"])
def test_locks_pin_what_pyproject_allows_and_name_no_place(lock):
    text = (ROOT / "requirements" / lock).read_text()
    assert "://" not in text
    pins = dict(line.lower().split("==") for line in text.splitlines() if not line.startswith("#"))
    extras = EXTRAS["vllm"] if lock == "gpu.lock" else []
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_gpu_lock_says_which_driver_it_needs():
    text = (ROOT / "requirements" / "gpu.lock").read_text()
    (torch,) = re.findall(r"^torch==(.*)$", text, re.MULTILINE)
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", text, re.MULTILINE)
    assert f"# torch {torch} is built for CUDA {cuda}: it needs an NVIDIA driver of version 580 or newer." in text


def test_install_lines_are_read_without_comments_and_words_for_the_shell(check_install):
    document = '```bash\npip install -e ".[vllm]"   # more\nmake\n```\npip install nothing\n'
    assert check_install.install_lines(document) == ['-e ".[vllm]"']
    found = check_install.requirements_of('-e ".[vllm]"', PROJECT)
    assert found == [*PROJECT["dependencies"], *EXTRAS["vllm"]]
    assert check_install.requirements_of("--no-deps -e .", PROJECT) == []
    assert "vllm==0.32.0" in check_install.requirements_of("-r requirements/gpu.lock", PROJECT)


def test_an_extra_that_is_not_there_is_named(check_install):
    with pytest.raises(ValueError, match=r"names 'flash', but the extras are vllm, "):
        check_install.requirements_of("-e .[vllm,flash]", PROJECT)
