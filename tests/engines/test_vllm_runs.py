"""Whole runs whose rollouts are vLLM's, on one rank and on two."""

from __future__ import annotations

import copy

import pytest

from longrl.engines.vllm import VLLMEngine
from longrl.testing.tiny import tiny_qwen2_5_vl
from tests.distributed import run_distributed
from tests.runs import config, metrics, rollouts, run
from tests.strategies.test_runs import grid
from tests.turns import every_nth_token

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE: dict = {
    "class_path": "longrl.engines.vllm.VLLMEngine",
    "init_args": {
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "kv_cache_gib": 0.0625,
        "enforce_eager": True,
        "options": {"block_size": 32},
    },
}


def with_vllm(folder):
    """3 steps of 2 optimizer steps with a encoder that trains, so that features change too."""
    model = tiny_qwen2_5_vl(folder / "model", text={"hidden_size": 192})
    values = config("rl", freeze_vision_encoder=False, model=str(model))
    sampling = {"num_generations": 2, "max_completion_tokens": 5}
    values["rollout"] = rollouts(sampling=sampling, engine=copy.deepcopy(ENGINE), max_mismatch=1e-3)
    values["trainer"]["max_steps"] = 6
    values["model"] |= {"mini_batches_per_rollout": 2, "optimizer": {"lr": 1e-3}}
    return values


def assert_engine_was_the_trainer(folder):
    gaps = [float(value) for (_, name), value in metrics(folder).items() if name == "train/sampler_kl"]
    assert len(gaps) == 3
    assert max(gaps) < 1e-8
    assert any(float(value) for (_, name), value in metrics(folder).items() if name == "train/grad_norm")


def odd(completion, row):
    """Differs within nearly every group, so that every step changes the weights."""
    return float(completion.token_ids.sum() % 2)


class Forgetful(VLLMEngine):
    """Keeps keys and values of older weights."""

    def reset_caches(self, features=True):
        if self.num_syncs:
            self._llm.reset_prefix_cache = lambda: True
        super().reset_caches(features)


def test_a_run_whose_engine_forgets_a_reset_ends_before_the_update(tmp_path):
    """The same two prompts in every step, so that the second step finds keys and values of the first one's weights."""
    values = with_vllm(tmp_path)
    rollout = values["rollout"]
    rollout["engine"]["class_path"] = f"{__name__}.Forgetful"
    rollout["max_mean_mismatch"] = 1e-3
    rollout["sampling"]["num_generations"] = 8
    rollout["reward"]["terms"] = [{"function": f"{__name__}.odd"}]
    values["data"] |= {"max_train_rows": 2}
    values["model"]["optimizer"]["lr"] = 0.02
    run_distributed(parts_from_forgetful_only, 1, tmp_path, values)


def parts_from_forgetful_only(folder, values):
    with pytest.raises(Exception, match=r"engine and trainer have parted: .* above max_mean_mismatch=0\.001"):
        run(folder / "run", values)
    values["rollout"]["engine"]["class_path"] = "longrl.engines.vllm.VLLMEngine"
    run(folder / "right", values)


class ShortTurns(VLLMEngine):
    """Ends turns with every second token, for random weights hardly ever say an end token."""

    def generate_turns(self, family, model, groups, *args):
        for trajectory in (one for group in groups for one in group):
            trajectory.stop_token_ids = every_nth_token(family, 2)
        super().generate_turns(family, model, groups, *args)


def test_a_run_with_turns(tmp_path):
    """Clips of the videos between them, through an encoder that trains; the above has a plain run of one rank."""
    values = with_vllm(tmp_path)
    values["rollout"]["engine"]["class_path"] = f"{__name__}.ShortTurns"
    values["rollout"]["environment"] = {
        "make": "tests.environment_runs.Clips", "max_turns": 3, "max_observed_tokens": 200, "show_tools": False,
    }  # fmt: skip
    (folder,) = run_distributed(run, 1, tmp_path / "run", values)
    assert_engine_was_the_trainer(folder)
    shown = [float(value) for (_, name), value in metrics(folder).items() if name == "rollout/observed_tokens"]
    assert sum(shown) > 0


def test_two_ranks_each_with_its_engine(tmp_path):
    """With a sequence for each, then with one for both; in the same processes, for to start vLLM takes the most."""
    values = with_vllm(tmp_path)
    run_distributed(run_all, 2, {tmp_path / str(sp): grid(values, 2, sp, 6) for sp in (1, 2)})
    assert_engine_was_the_trainer(tmp_path / "1")
    assert_engine_was_the_trainer(tmp_path / "2")


def run_all(runs):
    for folder, values in runs.items():
        run(folder, values)


def test_two_ranks_share_an_engine(tmp_path):
    """Tensor parallelism over the ranks that share sequences: both ask for the same, one has it scored."""
    values = grid(with_vllm(tmp_path), 2, 2, 6)
    values["rollout"]["engine"]["init_args"]["tensor_parallel_size"] = 2
    run_distributed(run, 2, tmp_path / "run", values)
    assert_engine_was_the_trainer(tmp_path / "run")
