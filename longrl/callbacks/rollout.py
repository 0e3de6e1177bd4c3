"""Fills a batch with rollouts before the step reads it: encode, generate, reward, select, refill."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from longrl.modules.policy import PolicyModule
from longrl.parallel import Parallel
from longrl.rewards import RewardSum
from longrl.rollout.engine import HFEngine, RolloutEngine, prompt_seed
from longrl.rollout.parity import Gap, check, stacked
from longrl.rollout.sharing import Piece, joined, pieces
from longrl.strategies.axis import Axis
from longrl.types import Batch, Completion, Group, Prompt, Row, SamplingParams

logger = logging.getLogger(__name__)

PARITY_TOKENS = 8
"""Of each prompt of the first batch, to compare engine and trainer."""
MAX_EMPTY_STEPS = 10
"""So many steps without a single group end the run."""


class RolloutCallback(Callback):
    """Drives a rollout engine: `batch.prompts` become `batch.groups`, and `batch.features` what they were made of.

    Training batches with SFT targets are left alone; validation, test and predict batches get greedy completions.

    Args:
        reward: scores completions.
        sampling: of training rollouts.
        eval_sampling: of validation, test and prediction; None is greedy, one completion.
        engine: generates; None is the trainer's own model.
        max_refills: how many further batches of prompts dynamic sampling may draw per step.
        max_gap: an engine with weights of its own must agree with the trainer to this in the log-probability of every
            greedy token of the first batch, or the run ends before its first step.
        seed: of the sampling; together with the number of the rollout and the prompt's id it decides every completion.
    """

    def __init__(
        self,
        reward: RewardSum,
        sampling: SamplingParams | None = None,
        eval_sampling: SamplingParams | None = None,
        engine: RolloutEngine | None = None,
        max_refills: int = 3,
        seed: int = 0,
        max_gap: float = 0.5,
    ) -> None:
        self.reward = reward
        self.sampling = sampling or SamplingParams()
        self.eval_sampling = eval_sampling or dataclasses.replace(
            self.sampling, num_generations=1, temperature=0.0, top_p=1.0, top_k=0
        )
        self.engine = engine or HFEngine()
        self.max_refills = max_refills
        self.seed = seed
        self.max_gap = max_gap
        self._checked = False
        self._num_rollouts = 0
        self._carried: list[Group] = []
        self._restored: list[dict[str, Any]] = []
        self._metrics: dict[str, float] = {}
        self._empty_steps = 0
        self._parallel = Parallel()

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._parallel = pl_module.parallel
        if stage == "fit" and trainer.datamodule.renderer.stage == "rl":
            pl_module.algorithm.validate(self.sampling, pl_module.steps_per_rollout)
            self.reward.validate(self.sampling.max_completion_tokens)
            pl_module.temperature = self.sampling.temperature or 1.0
            self._check_room(pl_module, trainer.datamodule.renderer.max_prompt_tokens)

    def _check_room(self, policy: PolicyModule, max_prompt_tokens: int | None) -> None:
        """Warns before weights are loaded of prompts that the update would refuse in the middle of the run."""
        ranks = max(policy.parallel.degrees)
        room = policy.max_tokens_per_micro_batch * ranks
        longest = (max_prompt_tokens or 0) + self.sampling.max_completion_tokens
        if longest > room:
            logger.warning(
                "data.max_prompt_tokens=%s and sampling.max_completion_tokens=%d may not fit a micro-batch of %d "
                "tokens; the first such prompt would end the run; raise model.max_tokens_per_micro_batch to %d",
                max_prompt_tokens, self.sampling.max_completion_tokens, room, math.ceil(longest / ranks),
            )  # fmt: skip

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch.prompts[0].response_ids is not None:
            return
        self._take_restored(trainer)
        data = pl_module.parallel.data
        wanted, refills = len(batch.prompts), 0
        groups = [dataclasses.replace(group, carried_over=True) for group in self._carried]
        prompts: Sequence[Prompt] = batch.prompts
        self._check_engine(pl_module, prompts, trainer.global_step)
        sampled: list[Group] = []
        while True:
            fresh = self._training_groups(pl_module, prompts, trainer.global_step)
            sampled += fresh
            groups += pl_module.algorithm.select(fresh)
            if not data.max(len(groups) < wanted) or refills == self.max_refills:
                break  # all ranks go on as long as one lacks groups, for they gather weights together
            prompts, refills = trainer.datamodule.refill(wanted), refills + 1
        self._count_empty(data.max(sum(int(group.valid.any()) for group in groups)), sampled)
        if len(groups) < wanted:
            logger.warning(
                "dynamic sampling kept %d of %d groups after %d refills; the step goes on with those "
                "(raise max_refills of the RolloutCallback, or use easier and harder prompts)",
                len(groups), wanted, refills,
            )  # fmt: skip
        batch.groups, self._carried = groups[:wanted], groups[wanted:]
        with pl_module.phases("encode"):
            batch.features = pl_module.encode([group.prompt for group in batch.groups])
        counts = {"groups_kept": len(groups), "prompts_drawn": len(sampled), "carried_over": len(self._carried)}
        means = {name: value / data.size for name, value in rollout_metrics(sampled).items()}
        totals = {f"rollout/{name}": float(value) for name, value in counts.items()}
        self._metrics = data.sum_dict(means | totals) | {"rollout/refills": float(refills)}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        pl_module.log_dict(self._metrics, batch_size=1)
        if "reward/mean" in self._metrics:
            pl_module.log("reward", self._metrics["reward/mean"], prog_bar=True, logger=False, batch_size=1)
        self._metrics = {}

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(pl_module, batch, trainer.global_step)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(pl_module, batch, trainer.global_step)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(pl_module, batch, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Every rank must call it: the carried-over groups of all are saved."""
        carried = [*map(saved_group, self._carried), *self._restored]  # restored ones wait for the first batch
        return {
            "num_rollouts": self._num_rollouts,
            "carried": self._parallel.data.gather(carried),
            "empty_steps": self._empty_steps,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_rollouts = state_dict["num_rollouts"]
        self._restored = own_share(state_dict["carried"], self._parallel.data)
        self._empty_steps = state_dict["empty_steps"]

    # -- work ----------------------------------------------------------------------------------------------------

    def _count_empty(self, num_useful: int, sampled: Sequence[Group]) -> None:
        """Ends a run that has nothing left to learn from."""
        self._empty_steps = 0 if num_useful else self._empty_steps + 1
        if self._empty_steps == MAX_EMPTY_STEPS:
            last = {name: round(value, 3) for name, value in rollout_metrics(sampled).items()}
            raise RuntimeError(
                f"in {MAX_EMPTY_STEPS} steps in a row no group was of use: every prompt is always or never right, or "
                f"every reward failed. The last rollout: {last}. Check the rewards, mix in other prompts, or set "
                "model.algorithm.select to longrl.algorithms.keep_all"
            )

    def _take_restored(self, trainer: Trainer) -> None:
        """Carried-over groups of a checkpoint hold rows; their prompts are rendered again, once data is set up."""
        self._carried += [restored_group(saved, trainer.datamodule.renderer) for saved in self._restored]
        self._restored = []

    def _training_groups(self, policy: PolicyModule, prompts: Sequence[Prompt], step: int) -> list[Group]:
        self._num_rollouts += 1
        seed = prompt_seed(self.seed, f"rollout {self._num_rollouts}")
        groups = self._scored_groups(policy, prompts, self.sampling, step, seed)
        if policy.algorithm.greedy_baseline:
            greedy = dataclasses.replace(self.sampling, num_generations=1, temperature=0.0)
            for group, best in zip(groups, self._scored_groups(policy, prompts, greedy, step, seed), strict=True):
                group.baseline = float(best.rewards[0])
                group.valid = group.valid & best.valid
        return groups

    def _scored_groups(
        self, policy: PolicyModule, prompts: Sequence[Prompt], sampling: SamplingParams, step: int, seed: int
    ) -> list[Group]:
        with policy.phases("encode"):
            features = policy.encode(prompts)
        team = policy.parallel.team
        own = pieces(len(prompts), sampling.num_generations, team.rank, team.size)
        with policy.phases("generate"), policy.trainer.precision_plugin.forward_context():
            self.engine.sync(policy.family, policy.model, step)
            groups = self._in_weights(policy, lambda: self._generate(policy, prompts, features, sampling, seed, own))
        with policy.phases("reward"):
            self.reward.score(groups)
            return joined(prompts, list(zip(own, groups, strict=True)), team, policy.parallel.num_gather_chunks)

    def _check_engine(self, policy: PolicyModule, prompts: Sequence[Prompt], step: int) -> None:
        """Before the first step: engine and trainer see the same prompts, positions, features and weights."""
        if self._checked or self.engine.needs_whole_weights:
            return
        greedy = dataclasses.replace(self.sampling, num_generations=1, temperature=0.0, top_p=1.0, top_k=0)
        short = dataclasses.replace(greedy, max_completion_tokens=min(PARITY_TOKENS, greedy.max_completion_tokens))
        features = policy.encode(prompts)
        self.engine.sync(policy.family, policy.model, step)
        found = self.engine.generate(policy.family, policy.model, prompts, features, short, self.seed)
        tokens = [[completion.token_ids for completion in own] for own in found]
        logp = policy.score(policy.entry, prompts, tokens, features, temperature=1.0)
        gap = Gap(stacked(found), logp.cpu())
        for name, value in gap.metrics().items():
            logger.info("engine against trainer before the first step: %s %.2e", name, value)
        check(gap, prompts, found, self.max_gap)
        self._checked = True

    def _in_weights(self, policy: PolicyModule, generate: Callable[[], list[Group]]) -> list[Group]:
        return policy.with_whole_weights(generate) if self.engine.needs_whole_weights else generate()

    def _generate(
        self,
        policy: PolicyModule,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        own: Sequence[Piece],
    ) -> list[Group]:
        """This rank's part of the groups: one call of the engine for whole prompts, one for each share of a prompt."""
        groups = []
        for (first, count), alike in itertools.groupby(own, key=lambda piece: (piece.first, piece.count)):
            asked = [prompts[piece.prompt] for piece in alike]
            params = dataclasses.replace(sampling, num_generations=count)
            answers = self.engine.generate(policy.family, policy.model, asked, features, params, seed, first)
            groups += [Group(prompt, completions) for prompt, completions in zip(asked, answers, strict=True)]
        return groups

    def _evaluate(self, policy: PolicyModule, batch: Batch, step: int) -> None:
        batch.groups = self._scored_groups(policy, batch.prompts, self.eval_sampling, step, self.seed)
        batch.features = policy.encode(batch.prompts)


def own_share(by_rank: Sequence[Sequence[Any]], data: Axis) -> list[Any]:
    """What a rank had, or with another number of ranks its share of what all had."""
    if len(by_rank) == data.size:
        return list(by_rank[data.rank])
    return [item for own in by_rank for item in own][data.rank :: data.size]


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the curves show of all that was sampled in a step, selected or not: rewards, parts, lengths, failures."""
    rewards = torch.cat([group.rewards for group in groups])
    lengths = torch.tensor([float(len(c.token_ids)) for group in groups for c in group.completions])
    cut = [c.finish_reason == "length" for group in groups for c in group.completions]
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std_in_group": float(torch.stack([group.rewards.std(correction=0) for group in groups]).mean()),
        "rollout/completion_tokens": float(lengths.mean()),
        "rollout/cut_off": sum(cut) / len(cut),
        "rollout/failed_rewards": float((~torch.cat([group.valid for group in groups])).float().mean()),
    }
    for name in groups[0].reward_parts:
        metrics[f"reward/{name}"] = float(torch.cat([group.reward_parts[name] for group in groups]).mean())
    return metrics


def saved_group(group: Group) -> dict[str, Any]:
    """A group as tensors and plain values, its prompt as the row it came from: pixels are not saved."""
    fields = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    row = dataclasses.asdict(group.prompt.row)
    row["metadata"] = dict(row["metadata"])
    return fields | {"prompt": row, "completions": [dataclasses.asdict(item) for item in group.completions]}


def restored_group(saved: Mapping[str, Any], render: Any) -> Group:
    """The inverse of `saved_group`; `render` makes a prompt from a row."""
    completions = [Completion(**item) for item in saved["completions"]]
    return Group(**{**saved, "prompt": render(Row(**saved["prompt"])), "completions": completions})
