"""Whole runs of two ranks whose rollouts come from one server; the second run finds the first one's weights there."""

from __future__ import annotations

import pytest

from longrl.testing.tiny import tiny_qwen2_5_vl
from tests.distributed import run_distributed
from tests.runs import config, metrics, rollouts, run
from tests.servers import RunningServer
from tests.strategies.test_runs import grid

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def values_of(model, engine=None):
    """3 steps of 2 optimizer steps with a encoder that trains, so that features change too."""
    values = config("rl", freeze_vision_encoder=False, model=str(model))
    sampling = {"num_generations": 2, "max_completion_tokens": 5}
    values["rollout"] = rollouts(sampling=sampling, max_mismatch=1e-3, engine=engine)
    values["trainer"]["max_steps"] = 6
    values["model"] |= {"mini_batches_per_rollout": 2, "optimizer": {"lr": 1e-3}}
    return values


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    running = RunningServer(folder, values_of(tiny_qwen2_5_vl(folder / "model", text={"hidden_size": 192})))
    yield running
    running.close()


def engine_at(server):
    options = {"urls": [server.url], "weights_folder": str(server.weights), "start_timeout_s": 600}
    return {"class_path": "longrl.engines.server.VLLMServerEngine", "init_args": options}


@pytest.mark.parametrize("sp", [1, 2])
def test_two_ranks_share_a_server(server, tmp_path, sp):
    values = grid(values_of(server.folder / "model", engine_at(server)), 2, sp, 6)
    run_distributed(run, 2, tmp_path / "run", values)
    gaps = [float(value) for (_, name), value in metrics(tmp_path / "run").items() if name == "train/sampler_kl"]
    assert len(gaps) == 3
    assert max(gaps) < 1e-8
    assert any(float(value) for (_, name), value in metrics(tmp_path / "run").items() if name == "train/grad_norm")
    assert not list(server.weights.iterdir())


def test_rollouts_overlap_the_update(server, tmp_path):
    """Only the first step's groups come from its own weights; the ratios of the others start elsewhere than at 1."""
    values = grid(values_of(server.folder / "model", engine_at(server)), 2, 2, 6)
    values["rollout"] |= {"max_staleness": 1, "max_mean_mismatch": 10.0}
    run_distributed(run, 2, tmp_path / "run", values)
    found = metrics(tmp_path / "run")
    gaps = [float(value) for (_, name), value in found.items() if name == "train/mismatch_mean"]
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-4  # with a step's change in them
    ratios = [abs(float(value) - 1) for (_, name), value in found.items() if name == "train/ratio_mean"]
    assert len(ratios) == 3
    assert min(ratios[1:]) > 1e-6
