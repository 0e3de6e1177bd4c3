"""Two ranks with unlike work: lengths, videos, one prompt between them. Every number logged is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from longrl.algorithms import Algorithm, sequence_mean, token_mean
from longrl.engines.hf import HFEngine
from longrl.models.lora import LoRASettings
from longrl.rewards import RewardSum, RewardTerm
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.testing.sample_prompts import noise_frames
from longrl.types import Batch, SamplingParams
from tests.callbacks.test_rollout import FakeEngine, callback, data_module, right_is_good, train as train_rollouts
from tests.distributed import run_distributed
from tests.modules.test_policy import policy_of, sampled, text_prompts, train
from tests.strategies.test_mr_sp import Encode
from tests.tiny import assert_same_gradients, row, text_family, vl_family

CASES = ("token mean", "sequence mean", "adapters")
TEXTS = ["right", "wrong", "right and longer", "w", "wrong and longer still", "right"]


def strategy(is_shared: bool, sp: int = 1) -> dict[str, Any]:
    return {"strategy": MRSPStrategy(sp, timeout_s=600), "devices": 2} if is_shared else {}


# ---- what the ranks do, and one process ----


def one_update(case: str, rank: int, count: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Two updates on one rollout; groups 0 and 2 have 28 tokens, group 1 has 12. Only group 0 may have a video."""
    if case == "adapters":
        family = vl_family(freeze_vision_encoder=True, lora=LoRASettings(rank=3))
        prompts = [family.render(row("video"), "What?", [noise_frames(6, 60, 60, "v")]), *text_prompts(family, 1)]
    else:
        family = text_family()
        prompts = text_prompts(family)
    rule = sequence_mean if case == "sequence mean" else token_mean
    policy = policy_of(family, algorithm=Algorithm(token_weights=rule, kl_coef=0.1), epochs_per_rollout=2)
    groups = sampled(family, prompts)[rank::count]
    batch = Batch([group.prompt for group in groups], groups=groups)
    seen = train(policy, batch, callbacks=[Encode()], **strategy(count > 1))
    return seen.metrics[-1], seen.gradients[0]


def lengths_differ(prompt_id: str, num_generations: int) -> list[str]:
    start = sum(prompt_id.encode())
    return [TEXTS[(start + number) % len(TEXTS)] for number in range(num_generations)]


def short(completion: Any, row: Any) -> float:
    if completion.text == "w":
        raise RuntimeError("this reward cannot judge")
    return float(len(completion.text) < 6)


def one_rollout(folder: Path, count: int) -> list[dict[str, float]]:
    """What three steps log of rollouts of 4 prompts in all, with weighted rewards."""
    reward = RewardSum([RewardTerm(right_is_good, 0.9), RewardTerm(short, 0.1)])
    rollouts = callback(FakeEngine(lengths_differ), reward=reward, sampling=SamplingParams(3, 64))
    data = data_module(folder, prompts_per_batch=4 // count)
    return train_rollouts(folder, rollouts, data=data, steps=3, **strategy(count > 1)).metrics


def one_prompt(folder: Path, sp: int) -> list[list[int]]:
    """Completions of one prompt, sampled by all ranks of a sequence-parallel group."""
    rollouts = callback(HFEngine(), sampling=SamplingParams(4, 6))
    data = data_module(folder, prompts_per_batch=1)
    (batch,) = train_rollouts(folder, rollouts, data=data, **strategy(sp > 1, sp)).batches
    return [completion.token_ids.tolist() for completion in batch.groups[0].completions]


class SaveAndDelete(Callback):
    """Saves beside what a run left that was killed in the middle of saving or deleting."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "step=2.ckpt")
        trainer.save_checkpoint(self.folder / "step=4.ckpt")
        trainer.strategy.remove_checkpoint(self.folder / "step=2.ckpt")


def everything(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    found: dict[str, Any] = {case: one_update(case, rank, 2) for case in CASES}
    found["rollout"] = one_rollout(folder / str(rank), 2)
    found["one prompt"] = one_prompt(folder / str(rank), 2)
    family = text_family()
    groups = sampled(family, text_prompts(family, 1))
    batch = Batch([group.prompt for group in groups], groups=groups)
    train(policy_of(family), batch, callbacks=[Encode(), SaveAndDelete(folder / "saved")], **strategy(True))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("0", "1", "saved/.step=1.ckpt.partial"):
        (folder / name).mkdir(parents=True)
    return folder, run_distributed(everything, 2, folder)


# ---- comparing ----


@pytest.mark.parametrize("case", CASES)
def test_metrics_of_an_update_are_over_all_tokens_not_means_of_ranks(ranks, case):
    """With adapters one rank has the only video, and its adapters' gradients are those of one process too."""
    wanted, gradients = one_update(case, 0, 1)
    assert {"train/loss", "train/entropy", "train/kl_ref", "train/ratio_mean", "train/grad_norm"} <= wanted.keys()
    for rank in ranks[1]:
        metrics, found = rank[case]
        assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert_same_gradients(found, gradients, 1e-5)


def test_metrics_of_a_rollout_are_means_over_all_completions(ranks, tmp_path):
    for rank in ranks[1]:
        assert len(rank["rollout"]) == 3
        for found, wanted in zip(rank["rollout"], one_rollout(tmp_path, 1), strict=True):
            names = {name for name in wanted if name.startswith(("reward/", "rollout/"))}
            assert {"reward/mean", "reward/short", "rollout/completion_tokens"} <= names
            assert {name: found[name] for name in names} == pytest.approx({name: wanted[name] for name in names})


def test_the_logged_reward_has_the_weights_and_its_parts_have_not(tmp_path):
    for metrics in one_rollout(tmp_path, 1):
        weighted = 0.9 * metrics["reward/right_is_good"] + 0.1 * metrics["reward/short"]
        assert metrics["reward/mean"] == pytest.approx(weighted)
        assert metrics["reward/mean"] not in (metrics["reward/right_is_good"], metrics["reward/short"])


def test_ranks_that_share_a_prompt_draw_different_samples_those_of_one_rank(ranks, tmp_path):
    wanted = one_prompt(tmp_path, 1)
    assert len({tuple(ids) for ids in wanted}) == 4
    assert [rank["one prompt"] for rank in ranks[1]] == [wanted, wanted]


def test_what_a_killed_run_left_goes_with_the_next_save(ranks):
    assert [file.name for file in (ranks[0] / "saved").iterdir()] == ["step=4.ckpt"]
