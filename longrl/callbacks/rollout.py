"""Fills a batch with rollouts before the step reads it: encode, generate, reward, select, refill."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.callbacks.group_sampler import GroupSampler, Request
from longrl.engines.hf import HFEngine
from longrl.engines.parity import MismatchMonitor
from longrl.engines.rollout_engine import RolloutEngine, prompt_seed, sampling_ids
from longrl.modules.policy import PolicyModule
from longrl.packing.lengths import length_problem
from longrl.rewards import RewardSum
from longrl.strategies.axis import Axis
from longrl.strategies.parallel import Parallel
from longrl.types import Batch, Completion, Group, Prompt, Row, SamplingParams

logger = logging.getLogger(__name__)

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
        max_resample_rounds: how many further batches of prompts dynamic sampling may draw per step.
        max_mismatch: an engine with weights of its own must agree with the trainer to this in the log-probability of every
            greedy token of the first batch, or the run ends before its first step.
        max_mean_mismatch: the same of the tokens of every step, on average; checked before the step changes the weights.
        bypass_old_logp_below: while the mean gap of the last step is below it, the engine's log-probabilities serve as
            those of the old policy, and the forward pass for them is saved; 0 never. Only a run that takes several
            optimizer steps per rollout has that pass.
        overlap: sample the next step's groups during the update, by weights one step older; their importance ratios
            are to the weights that sampled, and a step's change is part of the gap. Needs an engine in another process.
        seed: of the sampling; together with the number of the rollout and the prompt's id (and, of a prompt
            that comes again in a batch, which copy it is) it decides every completion.
    """

    def __init__(
        self,
        reward: RewardSum,
        sampling: SamplingParams | None = None,
        eval_sampling: SamplingParams | None = None,
        engine: RolloutEngine | None = None,
        max_resample_rounds: int = 3,
        seed: int = 0,
        max_mismatch: float = 0.5,
        max_mean_mismatch: float = 0.1,
        bypass_old_logp_below: float = 0.0,
        overlap: bool = False,
    ) -> None:
        self.reward = reward
        self.sampling = sampling or SamplingParams()
        self.eval_sampling = eval_sampling or dataclasses.replace(
            self.sampling, num_generations=1, temperature=0.0, top_p=1.0, top_k=0
        )
        self.engine = engine or HFEngine()
        self.max_resample_rounds = max_resample_rounds
        self.seed = seed
        self.overlap = overlap
        self.max_mismatch = max_mismatch
        self._gap = MismatchMonitor(max_mean_mismatch, bypass_old_logp_below, overlap)
        self._sampler = GroupSampler(self.engine, reward)
        self._compared = False
        self._ahead: Callable[[], list[Group]] | None = None
        self._num_rollouts = 0
        self._carried: list[Group] = []
        self._restored: dict[str, list[dict[str, Any]]] = {}
        self._metrics: dict[str, float] = {}
        self._empty_steps = 0
        self._parallel = Parallel()

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._parallel = pl_module.parallel
        self._sampler.validate(pl_module)
        self.engine.invalidate_weights()  # a stage may begin with other weights at the same step
        if stage == "fit" and trainer.datamodule.renderer.stage == "rl":
            pl_module.algorithm.validate(self.sampling, pl_module.steps_per_rollout)
            self.reward.validate(self.sampling.max_completion_tokens)
            self._check_engine_options(pl_module)
            pl_module.temperature = self.sampling.temperature or 1.0
            pl_module.gap = self._gap
            self._check_room(pl_module, trainer.datamodule.renderer.max_prompt_tokens)
        self.reward.prepare()  # a missing package or folder is found before weights are loaded

    def _check_engine_options(self, policy: PolicyModule) -> None:
        if self.overlap and not self.engine.is_remote:
            raise ValueError(
                "overlap=true of the RolloutCallback needs an engine in another process, got "
                f"{type(self.engine).__name__}; use longrl.engines.server.VLLMServerEngine, or overlap=false"
            )
        by_reward = policy.algorithm.kl_coef > 0 and policy.algorithm.kl_placement == "reward"
        if self._gap.bypass_below and (policy.steps_per_rollout == 1 or self.overlap or by_reward):
            logger.warning(
                "bypass_old_logp_below of the RolloutCallback has no effect: it saves the old policy's forward pass, "
                "which only a run with several optimizer steps per rollout has, without overlap and without KL in the "
                "reward; set it to 0, or raise model.mini_batches_per_rollout"
            )
        if self.sampling.top_p == 1 and self.sampling.top_k == 0:
            return
        if self._gap.bypass_below:
            raise ValueError(
                f"bypass_old_logp_below={self._gap.bypass_below} needs top_p=1 and top_k=0, got {self.sampling.top_p} and "
                f"{self.sampling.top_k}: the engine's log-probabilities are those of the filtered distribution; set "
                "bypass_old_logp_below of the RolloutCallback to 0"
            )
        self._gap.max_mismatch = math.inf
        logger.warning(
            "with top_p or top_k the engine's log-probabilities are those of the filtered distribution: gap metrics "
            "and importance corrections are biased, and max_mean_mismatch is not applied; set "
            "sampling.top_p to 1 and sampling.top_k to 0"
        )

    def _check_room(self, policy: PolicyModule, max_prompt_tokens: int | None) -> None:
        """Warns before weights are loaded of prompts that the update would refuse in the middle of the run."""
        longest = "the longest prompt of data.max_prompt_tokens", max_prompt_tokens or 0
        ranks = max(policy.parallel.degrees)
        for limit, option, sharing in (
            (policy.max_tokens_per_micro_batch, "model.max_tokens_per_micro_batch", ranks),
            (self.engine.max_length(), f"max_model_len of {type(self.engine).__name__}", 1),
        ):
            problem = length_problem(
                *longest, self.sampling.max_completion_tokens, limit=limit, option=option, ranks=sharing
            )
            if problem:
                logger.warning("%s; the first such prompt would end the run", problem)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch.prompts[0].response_ids is not None:
            return
        self._compare(pl_module, batch.prompts, trainer.global_step)
        self._take_restored(trainer)
        data = pl_module.parallel.dp
        wanted, refills = len(batch.prompts), 0
        groups = [dataclasses.replace(group, carried_over=True) for group in self._carried]
        fresh, upcoming = self._first_groups(trainer, pl_module, batch.prompts)
        sampled: list[Group] = []
        while True:
            sampled += fresh
            groups += pl_module.algorithm.select(fresh)
            if not data.max(len(groups) < wanted) or refills == self.max_resample_rounds:
                break  # all ranks go on as long as one lacks groups, for they gather weights together
            prompts, refills = trainer.datamodule.refill(wanted), refills + 1
            fresh = self._begin(pl_module, prompts, trainer.global_step)()
        self._count_empty(data.max(sum(int(group.valid.any()) for group in groups)), sampled)
        if len(groups) < wanted:
            logger.warning(
                "dynamic sampling kept %d of %d groups after %d refills; the step goes on with those "
                "(raise max_resample_rounds of the RolloutCallback, or use easier and harder prompts)",
                len(groups), wanted, refills,
            )  # fmt: skip
        batch.groups, self._carried = groups[:wanted], groups[wanted:]
        with pl_module.phases("encode"):
            batch.features = pl_module.encode([group.prompt for group in batch.groups], counted=False)
        if self.overlap:
            self._ahead = self._begin(pl_module, upcoming, trainer.global_step, in_background=True)
        self.engine.sleep()
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
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.sleep()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.engine.is_remote:  # an engine of this process ends with it, for vLLM takes the process group along
            self.engine.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Every rank must call it: the groups of all that wait for a later step are saved."""
        waiting = {"carried": self._carried, "ahead": self._finish_ahead()}
        saved = {name: [*map(saved_group, groups)] for name, groups in waiting.items()}
        for name, groups in self._restored.items():  # they wait for the first batch
            saved[name] += groups
        return {
            "num_rollouts": self._num_rollouts,
            "waiting": self._parallel.dp.gather(saved),
            "empty_steps": self._empty_steps,
            "gap": self._gap.last_mean,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_rollouts = state_dict["num_rollouts"]
        waiting, data = state_dict["waiting"], self._parallel.dp
        self._restored = {name: own_share([saved[name] for saved in waiting], data) for name in ("carried", "ahead")}
        self._empty_steps = state_dict["empty_steps"]
        self._gap.last_mean = state_dict["gap"]

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
        """Waiting groups of a checkpoint hold rows; their prompts are rendered again, once data is set up."""
        if not self._restored:
            return
        found = {
            name: [restored_group(saved, trainer.datamodule.renderer) for saved in groups]
            for name, groups in self._restored.items()
        }
        self._restored = {}
        self._carried += found.get("carried", [])
        ahead = found.get("ahead", [])
        if self._parallel.dp.max(len(ahead)):  # on all ranks or none, though one may have got no group
            self._ahead = lambda: ahead

    def _first_groups(
        self, trainer: Trainer, policy: PolicyModule, prompts: Sequence[Prompt]
    ) -> tuple[list[Group], Sequence[Prompt]]:
        """The first groups of a step, and the prompts to sample during its update.

        With `overlap` the groups were begun during the last update and those of the batch come next; the first step
        has none of those and draws another batch.
        """
        if self._ahead is None:
            fresh = self._begin(policy, prompts, trainer.global_step)()
            return fresh, trainer.datamodule.refill(len(prompts)) if self.overlap else ()
        groups, self._ahead = self._ahead(), None
        return [dataclasses.replace(group, carried_over=True) for group in groups], prompts

    def _finish_ahead(self) -> list[Group]:
        if self._ahead is None:
            return []
        groups = self._ahead()
        self._ahead = lambda: groups
        return groups

    def _begin(
        self, policy: PolicyModule, prompts: Sequence[Prompt], step: int, in_background: bool = False
    ) -> Callable[[], list[Group]]:
        """Starts a rollout and returns what waits for its groups, of all prompts, scored."""
        self._num_rollouts += 1
        seed = prompt_seed(self.seed, f"rollout {self._num_rollouts}")
        greedy = dataclasses.replace(self.sampling, num_generations=1, temperature=0.0)
        samplings = (self.sampling, greedy) if policy.algorithm.greedy_baseline else (self.sampling,)
        ids = sampling_ids([prompt.id for prompt in prompts], self._parallel.dp)
        request = Request(prompts, samplings, step, seed, ids)
        if not in_background:
            found = self._sampler.sample(policy, request)
            return lambda: with_baselines(*found)
        finish = self._sampler.begin(policy, request)
        return lambda: with_baselines(*finish())

    def _compare(self, policy: PolicyModule, prompts: Sequence[Prompt], step: int) -> None:
        if not self._compared:
            self._sampler.compare(policy, prompts, step, self.max_mismatch)
            self._compared = True

    def _evaluate(self, policy: PolicyModule, batch: Batch, step: int) -> None:
        self._compare(policy, batch.prompts, step)
        (batch.groups,) = self._sampler.sample(policy, Request(batch.prompts, (self.eval_sampling,), step, self.seed))
        batch.features = policy.encode(batch.prompts, counted=False)


def with_baselines(groups: list[Group], greedy: Sequence[Group] | None = None) -> list[Group]:
    """The groups with the reward of a greedy completion, where there is one."""
    for group, best in zip(groups, greedy or (), strict=greedy is not None):
        group.baseline = float(best.rewards[0])
        group.valid = group.valid & best.valid
    return groups


def own_share(by_rank: Sequence[Sequence[Any]], data: Axis) -> list[Any]:
    """What a rank had, or with another number of ranks its share of what all had."""
    if len(by_rank) == data.size:
        return list(by_rank[data.rank])
    return [item for own in by_rank for item in own][data.rank :: data.size]


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the curves show of all that was sampled in a step, selected or not: rewards, parts, lengths, failures."""
    if not groups:  # a run that goes on with more ranks than groups were waiting
        return {}
    lengths = torch.tensor([float(len(c.token_ids)) for group in groups for c in group.completions])
    cut = [c.finish_reason == "length" for group in groups for c in group.completions]
    return reward_metrics(groups) | {
        "rollout/completion_tokens": float(lengths.mean()),
        "rollout/cut_off": sum(cut) / len(cut),
    }


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and parts, means over the completions that could be rewarded (nan if none), and the others' share."""
    valid = torch.cat([group.valid for group in groups])
    spreads = [group.rewards[group.valid].std(correction=0) for group in groups if group.valid.any()]
    metrics = {
        "reward/mean": float(torch.cat([group.rewards for group in groups])[valid].mean()),
        "reward/std_in_group": float(torch.stack(spreads).mean()) if spreads else math.nan,
        "rollout/failed_rewards": float((~valid).float().mean()),
    }
    for name in groups[0].reward_parts:
        metrics[f"reward/{name}"] = float(torch.cat([group.reward_parts[name] for group in groups])[valid].mean())
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
