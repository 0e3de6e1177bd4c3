"""Every rank's engine is on its own GPU, whoever launched the ranks. vLLM is a stand-in but for the last test."""

import os

import pytest
import torch

from longrl.engines import vllm as vllm_module, vllm_launch
from longrl.engines.vllm import VLLMEngine
from longrl.evaluation import local_policy
from longrl.models.text import TextFamily
from longrl.testing.tiny import tiny_text
from tests.distributed import run_distributed
from tests.tiny import text_family

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def gpu(monkeypatch, index):
    """The process's current device, as `trainer.devices: [index]` leaves it."""
    monkeypatch.setattr(vllm_launch, "device_index", lambda: index)


def started(monkeypatch, **options):
    """What `vllm.LLM` is told by a starting engine, and the variables that its launcher reads."""
    seen = {}

    def llm(**arguments):
        seen.update(arguments)
        seen.update({name: os.environ.get(name) for name in TORCHRUN})

    monkeypatch.setattr(vllm_module, "_import_llm", lambda: llm)
    VLLMEngine(**options).start(text_family())
    return seen


def test_an_engine_alone_on_the_first_gpu_is_left_to_vllm(monkeypatch):
    gpu(monkeypatch, 0)
    assert "distributed_executor_backend" not in started(monkeypatch)


@pytest.mark.parametrize("launched_by_torchrun", [False, True])
def test_an_engine_alone_on_another_gpu_is_told_so(monkeypatch, launched_by_torchrun):
    """`--trainer.devices [3]`, and `evaluate` in the fourth process of torchrun: there is no process group."""
    given = dict.fromkeys(TORCHRUN, "7") if launched_by_torchrun else {}
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    gpu(monkeypatch, 3)

    told = started(monkeypatch)

    assert told["distributed_executor_backend"] == "external_launcher"
    assert [told[name] for name in TORCHRUN[:3]] == ["0", "3", "1"]
    assert told["MASTER_ADDR"] == "127.0.0.1"
    assert told["MASTER_PORT"] not in (None, "7")
    assert told["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    assert {name: os.environ[name] for name in TORCHRUN if name in os.environ} == given


def test_the_environment_is_as_it_was_after_an_engine_that_does_not_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    gpu(monkeypatch, 3)

    def fails(**_):
        raise ValueError("no memory")

    monkeypatch.setattr(vllm_module, "_import_llm", lambda: fails)
    with pytest.raises(RuntimeError, match="no memory"):
        VLLMEngine().start(text_family())
    assert "RANK" not in os.environ


def told_ranks(ranks_per_engine: int):
    """What a rank's engine is told where nobody has set torchrun's variables: Lightning's launcher, SLURM."""
    for name in TORCHRUN:
        os.environ.pop(name, None)
    with pytest.MonkeyPatch.context() as patch:
        gpu(patch, 4 + torch.distributed.get_rank())
        told = started(patch, tensor_parallel_size=ranks_per_engine)
    names = ("distributed_executor_backend", "tensor_parallel_size", *TORCHRUN[:3])
    return [told.get(name) for name in names]


@pytest.mark.parametrize("ranks_per_engine", [1, 2])
def test_each_rank_starts_its_engine_on_its_device(ranks_per_engine):
    told = run_distributed(told_ranks, 2, ranks_per_engine)
    size = None if ranks_per_engine == 1 else 2
    assert told == [["external_launcher", size, "0", "4", "2"], ["external_launcher", size, "1", "5", "2"]]


def test_a_device_that_an_evaluation_names_becomes_the_current_one(monkeypatch):
    """Its engine computes where the process's current device is."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    policy = local_policy.LocalPolicy(text_family(), device="cuda:3")
    assert policy.device == torch.device("cuda:3")
    assert current == [torch.device("cuda:3")]


@pytest.mark.vllm
def test_the_real_vllm_starts_as_it_is_told(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    run_distributed(start_alone, 1, str(tmp_path))


def start_alone(folder: str):
    """Without a process group: the one that the test's processes have ends first."""
    torch.distributed.destroy_process_group()
    family = TextFamily(str(tiny_text(folder, "qwen2", hidden_size=192)), random_init=True)
    small = {"block_size": 32, "seed": 0}
    engine = VLLMEngine(max_model_len=512, max_num_seqs=4, kv_cache_gib=0.01, enforce_eager=True, options=small)
    with pytest.MonkeyPatch.context() as patch:
        gpu(patch, 1)
        engine.start(family)
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    assert type(engine._llm.llm_engine.model_executor).__name__ == "ExecutorWithExternalLauncher"
    assert (worker.rank, worker.local_rank) == (0, 1)
    engine.close()
    torch.distributed.init_process_group("gloo", f"file://{folder}/after", rank=0, world_size=1)
