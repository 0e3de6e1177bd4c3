"""All rollout servers die for good: the run saves, ends with a code of its own, and goes on with nothing lost."""

from __future__ import annotations

import json
import os
import signal

import pytest
import yaml
from lightning.pytorch import Callback

from longrl.io.exit_codes import HUNG
from longrl.testing.engine_servers import EngineServers
from tests.runs import checkpoint, data_order, metrics, rollouts, run, run_in_child, text_config
from tests.test_resume import differences

pytest.importorskip("fastapi")

STEPS = 6


class KillServers(Callback):
    """Ends processes after a step."""

    def __init__(self, step: int, processes: list[int]) -> None:
        self.step, self.processes = step, processes

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            for process in self.processes:
                os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n)}) + "\n" for n in range(8)))
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config(rows)))
    options = {"seconds_per_token": 0.01, "in_fork": True}
    with EngineServers([folder / "config.yaml"], folder / "weights", folder / "log", **options) as started:
        started.folder = folder
        started.urls = [started.start(), started.start()]
        yield started


def values_of(servers, max_staleness):
    """2 epochs of 4 steps on 2 prompts each."""
    values = text_config(servers.folder / "rows.jsonl", "rl")
    options = {"urls": servers.urls, "weights_folder": str(servers.folder / "weights"), "recover_timeout_s": 0.3}
    engine = {"class_path": "longrl.engines.server.VLLMServerEngine", "init_args": options | {"retries": 0}}
    reward = "tests.runs.rare"
    values["rollout"] = rollouts(reward, engine=engine, max_staleness=max_staleness, max_mean_mismatch=1.0)
    values["trainer"] |= {"max_steps": STEPS, "max_epochs": -1}
    values["checkpoint"] = {"every_n_train_steps": 1000}
    return values


def prompts_in(folder):
    """Those that each step trained on."""
    return [[group[0] for group in groups] for _, _, groups in data_order(folder)]


@pytest.mark.parametrize(("max_staleness", "step"), [(0, 2), (0, 4), (1, 3), (2, 3)])
def test_without_servers_a_run_is_saved_and_goes_on(servers, tmp_path, capfd, max_staleness, step):
    """Step 4 is the last one of an epoch."""
    values = values_of(servers, max_staleness)
    reference = run(tmp_path / "reference", values)
    dying = values_of(servers, max_staleness)
    processes = [servers.processes[url] for url in servers.urls]
    kill = {"class_path": f"{__name__}.KillServers", "init_args": {"step": step, "processes": processes}}
    dying["trainer"]["callbacks"].append(kill)
    assert run_in_child(tmp_path / "run", dying, "--resume=auto") == HUNG
    told = [line for line in capfd.readouterr().err.splitlines() if "stopped at step" in line]
    assert len(told) == 1
    assert f"no rollout server is left for recover_timeout_s=0.3 ({servers.urls[0]}: " in told[0]
    assert f"stopped at step {step}; checkpoint: {tmp_path}/run/checkpoints/last.ckpt; go on by: " in told[0]
    for url in servers.urls:
        servers.start(url)
    run(tmp_path / "run", values, "--resume=auto")
    if max_staleness == 0:
        assert data_order(tmp_path / "run") == data_order(reference)
        assert metrics(tmp_path / "run") == metrics(reference)
        found = differences(checkpoint(tmp_path / "run"), checkpoint(reference))
        assert [place for place in found if "total/ready" not in place] == []  # Lightning's count of batches begun
    if max_staleness == 1:
        assert prompts_in(tmp_path / "run") == prompts_in(reference)
    trained = [prompt for prompts in prompts_in(tmp_path / "run") for prompt in prompts]
    assert len(trained) == 2 * STEPS
    assert len(set(trained[:8])) == 8  # all rows of the first epoch, each once
